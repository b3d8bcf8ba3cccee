"""What a trained model answers to the rows that are scored, and the scores of answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.answering.evaluate import evaluation
from lorakit.config.answering import EvaluateConfig
from lorakit.config.train import DataConfig
from lorakit.data.metrics.score import score, score_names
from lorakit.data.row_types import Rows
from lorakit.data.tasks import TASKS
from lorakit.paper.job import Job

Scores = dict[str, float | None]
"""By the scorer's names; None for one that does not exist, such as a constant's correlation."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a model answered."""

    answers: list[Any]
    """A text, a class or a number for each row, in the order of rows."""
    scores: Scores


def answered(
    job: Job, adapter: Path, data: Path | None, search: Mapping[str, Any], *, progress: bool
) -> Answered:
    """The answers of what a run has trained, and their scores.

    Args:
        job: the run's job.
        adapter: the folder of what it trained; a file of the answers is beside it meanwhile.
        data: the folder of all tasks; None: the hub.
        search: settings of `lorakit evaluate` for written answers.
        progress: show a bar on stderr.
    """
    file = adapter / "answers.jsonl"
    file.unlink(missing_ok=True)
    scoring, train = job.scoring, job.given["train"]
    rows = DataConfig(
        validation=job.source(scoring.split, data),
        validation_rows=scoring.rows,
        validation_every=scoring.every,
    )
    config = EvaluateConfig(
        data=rows,
        metrics=("task",),
        variant=scoring.variant,
        batch_size=scoring.batch_size,
        dtype=train.get("dtype", "float32"),
        outputs=file,
        **search,
    )
    found = evaluation(config, adapter, None, progress=progress)
    # Not splitlines: an answer may hold other line ends than a line feed.
    lines = file.read_text("utf-8").split("\n")[:-1]
    answers = [json.loads(line)["answer"] for line in lines]
    scores = {name: found.scores[name] for name in score_names(job.task) if name in found.scores}
    return Answered(answers=answers, scores=_finite(scores))


def scores_of(job: Job, rows: Rows, answers: Sequence[Any]) -> Scores:
    """The scores of answers, without a model.

    Args:
        job: the job whose answers they are.
        rows: the rows that they answer.
        answers: one for each row.
    """
    task = TASKS[job.task]
    found = score(
        job.task,
        [task.output(*pair) for pair in zip(answers, rows.rows, strict=True)],
        [task.reference(row) for row in rows.rows],
        variant=job.scoring.variant,
        **task.beside(rows.rows),
    )
    return _finite(found)


def _finite(scores: Mapping[str, float]) -> Scores:
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
