"""How long a small cell takes on one thread, before it is run: its tokens over measured speeds.

It is for plans: the speeds are those of one slow machine, and tokens are counted by characters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.row_types import ClassificationRow, PromptRow, Row, Rows
from lorakit.paper.check import Data
from lorakit.paper.job import Job

CHARACTERS = 4.0
"""Characters of English in a token, about."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens a second of a packaged model in float32 on one thread (AVX2, no fast bfloat16)."""

    trained: float
    """Of LoRA's training rows."""
    read: float
    """Of rows that are scored, and of prompts."""
    written: float
    """Of answers, many rows at once."""


SPEEDS: Mapping[str, Speed] = {
    "smollm2": Speed(trained=80.0, read=300.0, written=60.0),
    "minilm": Speed(trained=600.0, read=1800.0, written=1.0),
}
WHOLE_WEIGHTS = 1.4
"""How many times as long a step takes where whole matrices are trained."""


def seconds_of(job: Job, data: Data) -> float | None:
    """The seconds that a job takes on one thread, about; None: its model's speed is not known."""
    speed = SPEEDS.get(job.model)
    train = job.given["train"]
    if speed is None or not train.get("steps"):
        return None
    longest = train.get("data", {}).get("max_length")
    rows = data.training(job), data.scored(job)
    trained = train["steps"] * train["batch_size"] * _tokens(rows[0], longest)
    slower = WHOLE_WEIGHTS if {"full", "top-k"} & set(_methods(train)) else 1.0
    return trained * slower / speed.trained + _scoring(job, rows[1], speed, longest)


def _scoring(job: Job, rows: Rows, speed: Speed, longest: int | None) -> float:
    """The seconds of all evaluations: those in training, and of the best and the last adapter."""
    scoring, train = job.scoring, job.given["train"]
    during = train["steps"] // (train.get("eval_every") or train["steps"])
    times = 1 + (during + 1 if scoring.epoch == "best" else 0)
    read = times * len(rows) * _tokens(rows, longest) / speed.read
    if rows.kind == "classification":
        return read
    searches = [scoring.answers, *scoring.also.values()]
    beams = sum(search.get("num_beams", 1) for search in searches)
    return read + len(rows) * beams * _answer(rows) / speed.written


def _methods(train: Mapping[str, Any]) -> list[str]:
    method = train.get("method", "lora")
    return [method] if isinstance(method, str) else list(method)


def _tokens(rows: Rows, longest: int | None) -> float:
    """The mean tokens of a row."""
    found = [_characters(row) / CHARACTERS for row in rows.rows]
    return sum(min(each, longest or each) for each in found) / len(found)


def _answer(rows: Rows) -> float:
    """The mean tokens of a row's first reference."""
    texts = [row.completion or "" for row in rows.rows if isinstance(row, PromptRow)]
    return sum(map(len, texts)) / max(len(texts), 1) / CHARACTERS


def _characters(row: Row) -> int:
    match row:
        case ClassificationRow():
            return len(row.text) + len(row.text_pair or "")
        case PromptRow():
            return len(row.prompt) + len(row.completion or "")
        case _:
            return 0
