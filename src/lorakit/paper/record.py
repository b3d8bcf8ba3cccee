"""What the result of a run has: its job and data, its training, and the answers of its adapters."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config.train import TrainConfig
from lorakit.data.metrics.score import scorer
from lorakit.paper.check import Data
from lorakit.paper.job import Job
from lorakit.paper.outputs import Answered, answered
from lorakit.paper.shapes import trained_parameters
from lorakit.training.run import TrainResult
from lorakit.training.run_folder import LOG

UNRECORDED = {"out", "data", "resume", "overwrite", "sweep", "init_from"}
"""Settings of one call, and where the rows and what a run starts from lie."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a run answered."""

    evaluations: Mapping[str, Answered]
    """At its best evaluation and at its end; by another search "best, beam 10"."""
    seconds: float


def entry_of_job(job: Job, config: TrainConfig, data: Data) -> dict[str, Any]:
    """What is known of a run before it starts."""
    splits = {"train": job.train_split, "score": job.scoring.split}
    rows = {"train": data.training(job), "score": data.scored(job)}
    return {
        "cell": job.cell.id,
        "scale": job.scale,
        "variant": job.variant,
        "model": job.model,
        "task": job.task,
        "seed": job.seed,
        "hash": job.hash,
        "given": job.given,
        "settings": config.model_dump(mode="json", exclude=UNRECORDED),
        "data": {
            name: {
                "source": job.source(splits[name], None),
                "rows": len(rows[name]),
                "sha256": found,
            }
            for name, found in data.hashes(job).items()
        },
        "scorer": scorer(job.task, job.scoring.variant),
    }


def entry_of_run(
    config: TrainConfig, trained: TrainResult, answers: Answers, peak_bytes: int | None
) -> dict[str, Any]:
    """What is known of a run after it."""
    return {
        "scores": {name: each.scores for name, each in answers.evaluations.items()},
        "steps": trained.steps,
        "best_step": trained.best_step,
        "evaluations": _evaluations(trained.out),
        "loss": {"first": trained.first_loss, "last": trained.last_loss},
        "parameters": {
            "trained": trained.parameters,
            "without_head": trained_parameters(config.model, config),
        },
        "seconds": {"training": trained.seconds, "scoring": answers.seconds},
        "peak_memory_bytes": peak_bytes,
    }


def answers_of(job: Job, trained: TrainResult, data: Path | None, *, progress: bool) -> Answers:
    """What a run answers: at its best evaluation, if it has any, and at its end.

    At the evaluation that counts also by other searches.
    """
    start = time.perf_counter()
    scoring = job.scoring
    places = {"best": trained.out, "last": trained.out / "last"}
    if trained.best_step is None:
        del places["best"]
    found = {
        name: answered(job, place, data, scoring.answers, progress=progress)
        for name, place in places.items()
        if name == "last" or trained.best_step != trained.steps
    }
    # At the end of a run that is best there, both are the same.
    found = {name: found.get(name, found["last"]) for name in places}
    for name, search in scoring.also.items():
        place = places[scoring.epoch]
        found[f"{scoring.epoch}, {name}"] = answered(job, place, data, search, progress=progress)
    return Answers(evaluations=found, seconds=time.perf_counter() - start)


def _evaluations(out: Path) -> list[dict[str, Any]]:
    """The scores during training, from the run's log."""
    entries = map(json.loads, (out / LOG).read_text(encoding="utf-8").splitlines())
    return [
        {
            "step": entry["step"],
            **{
                name.removeprefix("eval_"): value
                for name, value in entry.items()
                if name.startswith("eval_")
            },
        }
        for entry in entries
        if "eval_loss" in entry
    ]
