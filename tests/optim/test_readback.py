"""Flags reach their callbacks once, in whatever order the device delivers them."""

from __future__ import annotations

import torch

from fused_so.optim.readback import Readback


class Event:
    """Stands in for a CUDA event."""

    def __init__(self):
        self.arrived = False

    def query(self):
        return self.arrived

    def synchronize(self):
        self.arrived = True


def test_a_value_on_the_cpu_is_acted_upon_at_once():
    seen = []
    Readback().watch(torch.tensor(True), seen.append)
    assert seen == [torch.tensor(True)]


def test_only_what_has_arrived_is_acted_upon_and_only_once():
    readback, seen = Readback(), []
    first, second = Event(), Event()
    readback._pending = [
        (first, torch.tensor(1), seen.append),
        (second, torch.tensor(2), seen.append),
    ]
    readback.poll()
    assert seen == []
    second.arrived = True
    readback.poll()
    readback.poll()
    assert [int(value) for value in seen] == [2]
    readback.flush()
    readback.flush()
    assert [int(value) for value in seen] == [2, 1]
