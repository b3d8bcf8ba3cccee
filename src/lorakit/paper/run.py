"""Running jobs: train, take the outputs of the best and the last evaluation, score, keep."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.bench.environment import environment
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.bench.result import threads
from lorakit.config.paper import PaperRunConfig
from lorakit.config.train import TrainConfig
from lorakit.data.metrics.score import score, scorer
from lorakit.errors import TrainingError
from lorakit.paper.check import Data, check, digest, notes
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.outputs import outputs_of, references_of
from lorakit.paper.results import State, file_of, finite, state_of, write_result
from lorakit.paper.shapes import trained_parameters
from lorakit.training.run import TrainResult, train
from lorakit.training.run_folder import LOG
from lorakit.training.trainer import list_checkpoints


@dataclass(frozen=True, kw_only=True)
class Done:
    """What `paper run` did."""

    states: Mapping[Job, State]
    """What there is of each job now, or before a dry run."""
    notes: Sequence[str]
    """What is to be known of the data."""


def run_cells(settings: PaperRunConfig, *, progress: bool) -> Done:
    """Run what settings choose and has no current result, after a check of all of it.

    Raises:
        LorakitError: something is missing or wrong; nothing was run.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    jobs = jobs_of(settings)
    data = check(settings, jobs)
    remarks = list(notes(data))
    where = environment()
    for note in remarks:
        print(note, file=sys.stderr)
    for number, job in enumerate(jobs, start=1):
        state = state_of(job, settings.results, data=data.hashes(job))
        if settings.dry_run or (state.kind in ("done", "failed") and not settings.redo):
            continue
        print(f"[{number}/{len(jobs)}] {job.name}", file=sys.stderr, flush=True)
        with threads(settings.threads):
            _run(job, settings, data, where, progress=progress)
    return Done(
        states={job: state_of(job, settings.results, data=data.hashes(job)) for job in jobs},
        notes=remarks,
    )


def _run(
    job: Job, settings: PaperRunConfig, data: Data, where: Mapping[str, Any], *, progress: bool
) -> None:
    """Run one job, and write its result."""
    out = settings.work / job.folder / f"seed-{job.seed}-{job.hash}"
    config = _going_on(job.config(data=settings.data, out=out))
    known = {
        "cell": job.cell.id,
        "scale": job.scale,
        "variant": job.variant,
        "model": job.model,
        "task": job.task,
        "seed": job.seed,
        "hash": job.hash,
        "given": job.given,
        "settings": config.model_dump(mode="json", exclude={"out", "data", "resume", "overwrite"}),
        "data": _data_entry(job, data),
        "scorer": scorer(job.task, job.scoring.variant),
        **where,
    }
    forget_peak()
    try:
        result = train(config, progress=progress)
    except TrainingError as error:
        # A run that diverges is a finding, and the others go on.
        print(f"{job.name}: {error}", file=sys.stderr)
        write_result(
            file_of(job, settings.results), {**known, "status": "failed", "error": str(error)}, {}
        )
        return
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(
            f"{job.name} {str(stop).partition(':')[0]}: run the same command to go on"
        ) from None
    peak = most_bytes()
    start = time.perf_counter()
    outputs = _outputs(job, result, data, progress=progress)
    references = references_of(data.scored(job))
    scores = {
        name: finite(score(job.task, each, references, variant=job.scoring.variant))
        for name, each in outputs.items()
    }
    measured = {
        "status": "done",
        "scores": scores,
        "steps": result.steps,
        "best_step": result.best_step,
        "evaluations": _evaluations(out),
        "loss": {"first": result.first_loss, "last": result.last_loss},
        "parameters": {
            "trained": result.parameters,
            "without_head": trained_parameters(config.model, config),
        },
        "seconds": {"training": result.seconds, "scoring": time.perf_counter() - start},
        "peak_memory_bytes": peak,
    }
    write_result(file_of(job, settings.results), {**known, **measured}, outputs)
    shutil.rmtree(out, ignore_errors=True)


def _going_on(config: TrainConfig) -> TrainConfig:
    """The settings that go on with an interrupted run, where there is one."""
    resumes = bool(list_checkpoints(config.out / "checkpoints"))
    return config.model_copy(update={"resume": resumes, "overwrite": not resumes})


def _data_entry(job: Job, data: Data) -> dict[str, Any]:
    parts = {"train": data.training(job), "score": data.scored(job)}
    sources = {"train": job.source("train", None), "score": job.source(job.scoring.split, None)}
    return {
        name: {"source": sources[name], "rows": len(rows), "sha256": digest(rows)}
        for name, rows in parts.items()
    }


def _outputs(job: Job, result: TrainResult, data: Data, *, progress: bool) -> dict[str, list[Any]]:
    """The outputs of what a run left: of its best evaluation, if it has any, and of its end."""
    rows = data.scored(job)
    last = outputs_of(job, result.out / "last", rows, progress=progress)
    if result.best_step is None:
        return {"last": last}
    same = result.best_step == result.steps
    best = last if same else outputs_of(job, result.out, rows, progress=progress)
    return {"best": best, "last": last}


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
