"""Flags reach their callbacks once, in whatever order the device delivers them."""

from __future__ import annotations

import pytest
import torch

from fused_so.optim.readback import Readback


class Event:
    """Stands in for a CUDA event."""

    def __init__(self):
        self.arrived = False

    def query(self):
        assert not torch.cuda.is_current_stream_capturing(), "operation not permitted"
        return self.arrived

    def synchronize(self):
        self.arrived = True


@pytest.fixture(autouse=True)
def capturing(monkeypatch):
    """Call it to say whether a CUDA graph is being captured."""

    def capture(state):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state)

    capture(False)
    return capture


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


def test_nothing_is_asked_of_a_device_whose_work_is_being_captured(capturing, monkeypatch):
    readback, seen = Readback(), []
    event = Event()
    event.arrived = True
    readback._pending = [(event, torch.tensor(1), seen.append)]
    monkeypatch.setattr(Readback, "waits_for", lambda _, value: True)
    monkeypatch.setattr(torch.cuda, "Event", None)
    capturing(True)
    readback.poll()
    readback.watch(torch.tensor(2), seen.append)
    assert seen == []
    capturing(False)
    readback.poll()
    readback.flush()
    assert [int(value) for value in seen] == [1]
