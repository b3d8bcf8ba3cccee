"""Measurements in rounds: each participant once a round, so that a slow moment slows all."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def nothing() -> None:
    """Do nothing: what comes before and after most measurements."""


@dataclass(frozen=True, kw_only=True)
class Participant:
    """One way to do the work, ours or a baseline, and what surrounds it untimed."""

    run: Callable[[], object]
    """The timed work of one round."""
    before: Callable[[], object] = nothing
    """Called before it, untimed."""
    after: Callable[[], object] = nothing
    """Called after it, untimed."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The times of one participant."""

    rounds: tuple[float, ...]
    """The time in each round that counts, in order."""

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def minimum(self) -> float:
        """The time of the fastest round."""
        return min(self.rounds)

    def to_json(self) -> dict[str, Any]:
        """Median, minimum and the time of every round."""
        return {"median": self.median, "minimum": self.minimum, "turns": list(self.rounds)}


def interleaved(
    participants: Mapping[str, Participant],
    *,
    repeats: int,
    warm_ups: int = 1,
    there_and_back: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """The times of each participant, all of which run once in each round.

    Args:
        participants: what is compared, in the order of a round.
        repeats: rounds that count.
        warm_ups: rounds before them, which do not count.
        there_and_back: reverse the order in every second round, so that no participant always
            follows the same one, and a machine that slows down slows all of them.
        clock: tells the seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in participants}
    there = list(participants.items())
    back = there[::-1] if there_and_back else there
    for number in range(warm_ups + repeats):
        for name, participant in back if number % 2 else there:
            participant.before()
            begun = clock()
            participant.run()
            times[name].append(clock() - begun)
            participant.after()
    return {name: Seconds(rounds=tuple(each[warm_ups:])) for name, each in times.items()}
