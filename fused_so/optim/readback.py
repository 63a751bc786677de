"""Flags computed on a device, acted upon on the host without waiting for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Readback:
    """Runs a callback with a tensor's value once it has reached the host.

    On a CPU that is at once. On a GPU the value is copied behind the queued work, and `poll`
    runs the callbacks of the copies that have arrived; nothing ever waits. While a CUDA graph is
    captured the queued work does not run: what is watched then has no value, now or when the graph
    is replayed, and its callback never runs.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[torch.cuda.Event, Tensor, Callable[[Tensor], None]]] = []

    def watch(self, value: Tensor, callback: Callable[[Tensor], None]) -> None:
        if not self.waits_for(value):
            callback(value)
            return
        if _capturing():
            return
        on_host = value.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(value.device))
        self._pending.append((arrived, on_host, callback))

    @staticmethod
    def waits_for(value: Tensor) -> bool:
        """Whether knowing the value on the host takes waiting for it."""
        return value.device.type == "cuda"

    def poll(self) -> None:
        # A capture ends in an error if an event is queried.
        if self._pending and _capturing():
            return
        waiting, self._pending = self._pending, []
        for arrived, value, callback in waiting:
            if arrived.query():
                callback(value)
            else:
                self._pending.append((arrived, value, callback))

    def flush(self) -> None:
        """Waits for every value under way and runs its callback."""
        for arrived, _, _ in self._pending:
            arrived.synchronize()
        self.poll()


def _capturing() -> bool:
    # Without a CUDA build of PyTorch there is nobody to ask.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
