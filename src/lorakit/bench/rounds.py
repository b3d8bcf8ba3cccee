"""Contestants measured in turns, so that a slow moment of the machine is everybody's."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def nothing() -> None:
    """Do nothing: what comes before and after most contestants."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do the work, and what surrounds it untimed."""

    run: Callable[[], object]
    """What is timed."""
    before: Callable[[], object] = nothing
    """Called before each turn."""
    after: Callable[[], object] = nothing
    """Called after each turn."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What one contestant took."""

    turns: tuple[float, ...]
    """The time of each turn that counts, in order."""

    @property
    def median(self) -> float:
        """The middle of the turns."""
        return statistics.median(self.turns)

    @property
    def minimum(self) -> float:
        """The fastest turn."""
        return min(self.turns)

    def to_json(self) -> dict[str, Any]:
        """Return median, minimum and every turn."""
        return {"median": self.median, "minimum": self.minimum, "turns": list(self.turns)}


def interleaved(
    contestants: Mapping[str, Contestant],
    *,
    repeats: int,
    warm_ups: int = 1,
    there_and_back: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """The time of each contestant: all have their first turn, then all their second, …

    Args:
        contestants: who takes part, in the order of their turns.
        repeats: turns that count.
        warm_ups: turns before them, which do not count.
        there_and_back: go through the contestants backwards every second time, so that none always
            has the same one before it, and a machine that slows down slows all of them.
        clock: tells the seconds.
    """
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    there = list(contestants.items())
    back = there[::-1] if there_and_back else there
    for number in range(warm_ups + repeats):
        for name, contestant in back if number % 2 else there:
            contestant.before()
            begun = clock()
            contestant.run()
            turns[name].append(clock() - begun)
            contestant.after()
    return {name: Seconds(turns=tuple(each[warm_ups:])) for name, each in turns.items()}
