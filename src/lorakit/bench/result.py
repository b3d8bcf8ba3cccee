"""A benchmark's result: seconds, ratios, the goals beside what was got, and the circumstances."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorakit.bench.environment import environment
from lorakit.bench.peers import require_peft
from lorakit.bench.rounds import Seconds
from lorakit.config.base import DType, PositiveInt, Settings
from lorakit.errors import OutputError

OURS = "ours"
"""The contestant with which every other one of a measurement is compared."""
Timings = Mapping[str, Mapping[str, Seconds]]
"""Measurement, contestant: what it took."""


class Measured(Settings):
    """What every benchmark is told."""

    model: str = "smollm2"
    """Base model: a packaged name (smollm2, minilm), a folder, or a hub id."""

    dtype: DType = "bfloat16"
    """Precision of the base."""

    threads: PositiveInt | None = None
    """Threads of torch. None: as many as torch takes by itself."""

    out: Path | None = None
    """JSON file for the result, which is replaced. None: none."""


class BenchConfig(Measured):
    """What benchmarks are told in which contestants take turns."""

    rank: PositiveInt = 8
    """Rank of the adapters, which sit on all linear layers."""

    adapter_dtype: DType = "float32"
    """Precision of A and B."""

    repeats: PositiveInt = 7
    """Turns that each contestant has; medians are compared."""

    peer: bool = True
    """Measure PEFT too, which the extra `bench` installs."""


C = TypeVar("C", bound=Measured)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What should be reached, beside what was."""

    what: str
    got: float
    limit: float
    unit: str = "x"
    """x for a ratio, else the unit of `got`: us, s, %."""
    at_least: bool = False
    """Whether the limit is the least that is good, and not the most."""

    @property
    def met(self) -> bool:
        """Whether it was reached."""
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
    """What one benchmark measured."""

    timings: Timings
    goals: tuple[Goal, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    """Contestant: largest resident set in bytes, or the most memory of the GPU."""
    checks: Mapping[str, Any] = field(default_factory=dict)
    """What was checked besides, and what came out."""
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """More figures: rows that map a column to a value. A column's name ends with its unit, `_s`,
    `_bytes` or `_percent`, where it has one of these."""
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Contestant: the loss of each step."""

    def ratios(self) -> dict[str, dict[str, float]]:
        """Each peer's time (or memory) over ours, by peer and measurement.

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


def run_bench(name: str, settings: C, measure: Callable[[C], Findings]) -> dict[str, Any]:
    """A benchmark's result as plain values, written to `settings.out` too.

    Raises:
        OutputError: `settings.out` cannot be written; said before anything is measured.
        MissingExtraError: PEFT is to be measured and is not installed.
    """
    check_writable(settings.out)
    if isinstance(settings, BenchConfig) and settings.peer:
        require_peft()
    with threads(settings.threads):
        start = environment()
        findings = measure(settings)
    result = {
        "bench": name,
        "settings": settings.model_dump(mode="json", exclude={"out", "plot"}),
        **start,
        "seconds": {
            what: {who: seconds.to_json() for who, seconds in each.items()}
            for what, each in findings.timings.items()
        },
        "memory_bytes": dict(findings.memory),
        "ratios": findings.ratios(),
        "goals": [goal.to_json() for goal in findings.goals],
        "checks": dict(findings.checks),
        "tables": {name: [dict(row) for row in rows] for name, rows in findings.tables.items()},
        "curves": {name: list(losses) for name, losses in findings.curves.items()},
    }
    if settings.out is not None:
        settings.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


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
