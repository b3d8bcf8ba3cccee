"""Jobs that are trained together: LoRA runs that differ in ranks, layers or seeds, by a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit.config.train import TrainConfig
from lorakit.errors import TrainingError
from lorakit.paper.job import Job
from lorakit.training.checkpoints import list_checkpoints
from lorakit.training.run import TrainResult
from lorakit.training.sweep.grid import VARYING
from lorakit.training.sweep.report import FIGURES
from lorakit.training.sweep.sweep import sweep

TOGETHER = ("lora", "seed")
"""What may differ between runs that are trained together; all else is as long, and as scored."""


def groups(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """The jobs, in their order, in groups of at most `size` that can be trained together.

    Args:
        jobs: what is to be run.
        size: 1: each alone.
    """
    waiting = list(jobs)
    while waiting:
        first = waiting[0]
        alike = [job for job in waiting if _kind(job) == _kind(first)]
        # Of runs that are the same one is made, which the other cell then takes over.
        different: dict[tuple[str, int], Job] = {}
        for job in alike:
            different.setdefault((job.hash, job.seed), job)
        most = size if first.given["train"].get("method") == "lora" else 1
        together = list(different.values())[:most]
        yield together
        waiting = [job for job in waiting if job not in together]


def _kind(job: Job) -> str:
    """The key of jobs that can train together: their model, task and shared settings."""
    train = {name: value for name, value in job.given["train"].items() if name not in TOGETHER}
    return json.dumps([job.model, job.task, {**job.given, "train": train}], sort_keys=True)


def train_together(
    jobs: Sequence[Job], configs: Sequence[TrainConfig], out: Path, *, progress: bool
) -> list[TrainResult | TrainingError]:
    """Train jobs in one batch, or go on where that was interrupted.

    Args:
        jobs: of one group.
        configs: their settings.
        out: the folder of all; each has one in it.
        progress: show a bar on stderr.

    Returns:
        The result of each, or what stopped it.
    """
    flat = [dict(_flat(config)) for config in configs]
    differing = [key for key in flat[0] if any(each[key] != flat[0][key] for each in flat)]
    trials = [
        {"name": f"{job.cell.id}-seed-{job.seed}", **{key: each[key] for key in differing}}
        for job, each in zip(jobs, flat, strict=True)
    ]
    resumes = (out / FIGURES).is_file() or any(
        list_checkpoints(out / trial["name"] / "checkpoints") for trial in trials
    )
    asked = {"out": out, "sweep": trials, "resume": resumes, "overwrite": not resumes}
    try:
        found = {
            each.name: each
            for each in sweep(configs[0].model_copy(update=asked), progress=progress).trials
        }
    except TrainingError as error:
        # None of them came to its end.
        return [error for _ in jobs]
    ended = [found[trial["name"]] for trial in trials]
    return [each.trained or TrainingError(str(each.error)) for each in ended]


def _flat(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """The settings that may vary, by their dotted names, as JSON values."""
    values = config.model_dump(mode="json")
    for key in VARYING:
        section, _, name = key.rpartition(".")
        yield key, values[section][name] if section else values[name]
