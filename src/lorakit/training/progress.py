"""Progress on stderr: a bar in a terminal, and plain lines at intervals anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

INTERVAL_S = 10.0
"""Seconds between two plain lines."""


def progress_bar(
    *, total: int, title: str, unit: str, show: bool, initial: int = 0
) -> tqdm[Any] | PlainProgress:
    """The display of the progress of `total` units: a bar, or plain lines where nobody sees a bar.

    Args:
        total: how many units there are.
        title: what is done.
        unit: the name of one.
        show: False: nothing is shown.
        initial: how many are done already.
    """
    if show and not is_terminal():
        return PlainProgress(total=total, title=title, unit=unit, initial=initial)
    return tqdm(
        total=total,
        initial=initial,
        desc=title,
        unit=unit,
        file=sys.stderr,
        disable=not show,
        dynamic_ncols=True,
    )


def steps(total: int, size: int, *, title: str, show: bool) -> Iterator[int]:
    """The first item of each batch of a size, showing the progress in batches."""
    starts = range(0, total, size)
    bar = progress_bar(total=len(starts), title=title, unit="batch", show=show)
    try:
        for start in starts:
            yield start
            bar.update()
    finally:
        bar.close()


def is_terminal() -> bool:
    """Whether stderr is a terminal that understands a carriage return."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class PlainProgress:
    """Progress as lines, such as `training: 40 of 300 steps, 12 s, 78 s left, loss 0.42`."""

    def __init__(self, *, total: int, title: str, unit: str, initial: int = 0) -> None:
        self.n = initial
        self._initial, self._total, self._title, self._unit = initial, total, title, unit
        self._figures: Mapping[str, str] = {}
        self._started = self._shown_at = time.monotonic()
        self._shown = -1

    def update(self, count: int = 1) -> None:
        """Advance, and print a line if the last one is some seconds old."""
        self.n += count
        if time.monotonic() - self._shown_at >= INTERVAL_S:
            self._print()

    def set_postfix(self, figures: Mapping[str, str]) -> None:
        """Show these figures, by name, in the lines to come."""
        self._figures = dict(figures)

    def close(self) -> None:
        """Print the last line."""
        if self.n != self._shown and self.n > self._initial:
            self._print()

    def _print(self) -> None:
        self._shown, self._shown_at = self.n, time.monotonic()
        seconds = self._shown_at - self._started
        parts = [f"{self.n} of {self._total} {self._unit}{'es' if self._unit == 'batch' else 's'}"]
        parts.append(f"{seconds:.0f} s")
        left = seconds / (self.n - self._initial) * (self._total - self.n)
        if left:
            parts.append(f"{left:.0f} s left")
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        print(f"{self._title}: {', '.join(parts)}", file=sys.stderr, flush=True)
