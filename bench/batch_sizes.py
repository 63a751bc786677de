"""How many examples an update sees: as many every time, or ever more."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchSizes:
    """From `first` rows to `last`, exponentially, within so many updates; then as many every time.

    Martens and Grosse 2015, section 13, where `last` is the whole training set, at update 500.
    Written "256" where it is constant, else as "128:1024:500" (first, last, updates).
    """

    first: int
    last: int
    updates: int

    @classmethod
    def parse(cls, text: int | str) -> BatchSizes:
        """Raises ValueError naming the rule that `text` breaks."""
        try:
            numbers = [int(part) for part in str(text).split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers = [numbers[0], numbers[0], 1]
        if len(numbers) != 3 or min(numbers) < 1 or numbers[0] > numbers[1]:
            raise ValueError(
                f"must be a positive int, or FIRST:LAST:UPDATES with FIRST at most LAST, "
                f"got {text!r}"
            )
        return cls(*numbers)

    def at(self, update: int) -> int:
        """The size of update 0, 1, ..."""
        # m_k = min(m_0 (m_K / m_0)^(k / K), m_K)
        growth = (self.last / self.first) ** min(update / self.updates, 1.0)
        return min(round(self.first * growth), self.last)


def batch_size(text: str) -> int | str:
    """An argparse type: a number, or a schedule as it was written."""
    try:
        sizes = BatchSizes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return sizes.first if ":" not in text else text
