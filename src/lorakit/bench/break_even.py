"""What a contestant's first steps cost, and after how many steps compiling has paid."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.bench.result import OURS
from lorakit.bench.train_clock import Turn
from lorakit.bench.train_processes import Record

COMPILED = {"compiled": OURS, "peft_compiled": "peft"}
"""Contestants that go through torch.compile, and the same without."""


def start_ups(records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Each contestant's seconds of start-up, and where it has caught up with its like.

    Start-up is the time of the turns of warm-up above that of as many usual turns; all turns have
    equally many steps. The last column is the number of steps from which on compiling has saved
    time, or "never"; it is None where there is nothing to compare with.
    """
    rows = []
    for way, record in records.items():
        eager = records.get(COMPILED.get(way, ""))
        rows.append(
            {
                "who": way,
                "start-up_s": start_up(record),
                "break-even steps": None if eager is None else break_even(record, eager),
            }
        )
    return rows


def start_up(record: Record) -> float:
    """Return how many seconds longer the warm-up took than as many usual turns."""
    usual = statistics.median(turn.seconds for turn in record.turns)
    return sum(turn.seconds - usual for turn in record.warm_ups)


def break_even(compiled: Record, eager: Record) -> int | str:
    """Return from which number of steps on a compiled run has taken less time than an eager one."""
    saved = _step(eager.turns) - _step(compiled.turns)
    if saved <= 0:
        return "never"
    return max(math.ceil((start_up(compiled) - start_up(eager)) / saved), 0)


def _step(turns: Sequence[Turn]) -> float:
    """The usual seconds of a step."""
    return statistics.median(turn.seconds / len(turn.rows) for turn in turns)
