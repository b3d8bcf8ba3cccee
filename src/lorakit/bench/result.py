"""A benchmark's result: seconds, ratios, goals beside what was measured, and the environment."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorakit.bench.environment import environment, uncommitted
from lorakit.bench.peers import require_peft
from lorakit.bench.rounds import Seconds
from lorakit.config.bench import BenchConfig, Measured
from lorakit.errors import OutputError

OURS = "ours"
"""The participant that is lorakit; the others are its baselines."""
SHOWN = 3
"""Changed files that a message names."""
Timings = Mapping[str, Mapping[str, Seconds]]
"""The seconds of each participant, by measurement."""


C = TypeVar("C", bound=Measured)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A limit, and what was measured."""

    what: str
    got: float
    limit: float
    unit: str = "x"
    """x for a ratio, else the unit of `got`: us, s, %."""
    at_least: bool = False
    """Whether the limit is a lower one."""

    @classmethod
    def never(cls, what: str, count: int) -> Goal:
        """That something does not happen, and how often it did."""
        return cls(what=what, got=float(count), limit=0.0, unit="")

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.got >= self.limit if self.at_least else self.got <= self.limit

    def to_json(self) -> dict[str, Any]:
        """The goal as plain values."""
        kind = "at_least" if self.at_least else "at_most"
        return {"what": self.what, kind: self.limit, "unit": self.unit} | {
            "got": self.got,
            "met": self.met,
        }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The measurements of one benchmark."""

    timings: Timings
    goals: tuple[Goal, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    """The largest resident set of each participant in bytes, or its peak on the GPU."""
    checks: Mapping[str, Any] = field(default_factory=dict)
    """What was checked besides, by what it is called."""
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Further tables, whose rows map a column to a value. The name of a column in seconds, bytes or
    per cent ends with `_s`, `_bytes` or `_percent`."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """The loss of each step, by participant."""

    def ratios(self) -> dict[str, dict[str, float]]:
        """Time (or memory) of each baseline over ours, by baseline and measurement.

        More than 1 is in our favour.
        """
        found: dict[str, dict[str, float]] = {}
        medians = {
            what: {name: seconds.median for name, seconds in each.items()}
            for what, each in self.timings.items()
        }
        for what, each in {**medians, "memory": self.memory}.items():
            for name, amount in each.items():
                if name != OURS:
                    found.setdefault(name, {})[what] = amount / each[OURS]
        return found

    def to_json(self) -> dict[str, Any]:
        """The measurements, and the ratios that follow from them, as plain values."""
        return {
            "seconds": {
                what: {who: seconds.to_json() for who, seconds in each.items()}
                for what, each in self.timings.items()
            },
            "memory_bytes": dict(self.memory),
            "ratios": self.ratios(),
            "goals": [goal.to_json() for goal in self.goals],
            "checks": dict(self.checks),
            "tables": {name: [dict(row) for row in rows] for name, rows in self.tables.items()},
            "curves": {name: list(losses) for name, losses in self.curves.items()},
        }


def run_bench(name: str, settings: C, measure: Callable[[C], Findings]) -> dict[str, Any]:
    """A benchmark's result as plain values, which is written to `settings.out` too.

    Raises:
        OutputError: `settings.out` cannot be written, or the sources have uncommitted changes;
            raised before anything is measured.
        MissingExtraError: PEFT is to be measured and is not installed.
    """
    check_result(settings.out)
    if isinstance(settings, BenchConfig) and settings.peer:
        require_peft()
    with threads(settings.threads):
        start = environment()
        findings = measure(settings)
    told = settings.model_dump(mode="json", exclude={"out", "plot"})
    result = {"bench": name, "settings": without_places(told), **start, **findings.to_json()}
    if settings.out is not None:
        settings.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def without_places(told: Any) -> Any:
    """Settings as a result tells them: of a place on this machine its last name alone."""
    if isinstance(told, dict):
        return {name: without_places(value) for name, value in told.items()}
    if isinstance(told, list):
        return [without_places(value) for value in told]
    return Path(told).name if isinstance(told, str) and Path(told).is_absolute() else told


def check_result(out: Path | None) -> None:
    """Make sure that a result can be written, and that a commit has the code that it measures.

    Raises:
        OutputError: it cannot be written, or files of the checkout have uncommitted changes.
    """
    check_writable(out)
    changed = uncommitted() if out is not None else []
    if changed:
        listed = ", ".join(changed[:SHOWN]) + (", …" if len(changed) > SHOWN else "")
        raise OutputError(
            f"{out} cannot be written: {listed} {'has' if len(changed) == 1 else 'have'} "
            "uncommitted changes, so no commit would have the code that was measured. Commit "
            "first, or leave out --out to see the tables alone"
        )


def check_writable(out: Path | None) -> None:
    """Make sure that a file can be written, if there is one.

    Raises:
        OutputError: it is a folder, or in a folder that does not exist.
    """
    if out is None:
        return
    if out.is_dir():
        raise OutputError(f"{out} is a folder: name a file for the result")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out} cannot be written: there is no folder {out.absolute().parent}")


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads inside a block; None changes nothing."""
    found = torch.get_num_threads()
    torch.set_num_threads(found if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(found)
