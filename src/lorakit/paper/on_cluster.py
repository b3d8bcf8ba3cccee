"""Jobs as tasks on a cluster: each by the same command, for its cell, task and seed alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lorakit.paper.job import Job
from lorakit.paper.settings import PaperRunConfig
from lorakit.training.cluster import connected, run_tasks

RunCells = Callable[..., object]
"""What runs the cells that settings choose in this process."""


def run_on_cluster(
    jobs: Sequence[Job], settings: PaperRunConfig, run_cells: RunCells, *, progress: bool
) -> None:
    """Run jobs on the cluster of the settings; what ends is kept, whatever becomes of others.

    Jobs of which one takes over another's result, or starts from its adapter, are one task.

    Raises:
        LorakitError: a task could not be run; the others were.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    assert settings.ray is not None
    if not jobs:
        return
    chains: dict[tuple[str, str, int], list[Job]] = {}
    for job in jobs:
        first = job.start or job
        chains.setdefault((first.hash, first.task, first.seed), []).append(job)
    tasks = {
        ", ".join(job.name for job in chain): partial(
            _run_chain, [_alone(settings, job) for job in chain], run_cells
        )
        for chain in chains.values()
    }
    how: dict[str, Any] = {"title": "cells", "unit": "run", "show": progress}
    errors: list[BaseException] = []
    try:
        with connected(settings.ray):
            ended = run_tasks(tasks, cpus=settings.threads or 1, **how)
            for done, (name, _, error) in enumerate(ended, start=1):
                print(f"[{done}/{len(tasks)}] {name}", file=sys.stderr, flush=True)
                errors += [error] if error is not None else []
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: run the same command to go on") from None
    if errors:
        raise errors[0]


def _alone(settings: PaperRunConfig, job: Job) -> PaperRunConfig:
    """The settings that choose one job, to be run in the process that gets them."""
    chosen = {"cells": (job.cell.id,), "tasks": (job.task,), "seeds": (job.seed,), "ray": None}
    model = job.model if job.scale == "full" else None
    return settings.model_copy(update={**chosen, "model": model})


def _run_chain(chain: Sequence[PaperRunConfig], run_cells: RunCells) -> None:
    for settings in chain:
        run_cells(settings, progress=False)
