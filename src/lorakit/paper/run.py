"""Running jobs: train, have the best and the last adapter answer, score, keep."""

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
from lorakit.data.metrics.score import scorer
from lorakit.errors import TrainingError
from lorakit.paper.check import Data, check, notes
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.outputs import Answered, answered
from lorakit.paper.results import (
    State,
    file_of,
    read_outputs,
    read_result,
    same_run,
    state_of,
    write_result,
)
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
        same = None if settings.redo else same_run(job, settings.results, data.hashes(job))
        if same is not None:
            _take_over(job, same, settings.results)
            continue
        with threads(settings.threads):
            _run(job, settings, data, where, progress=progress)
    return Done(
        states={job: state_of(job, settings.results, data=data.hashes(job)) for job in jobs},
        notes=remarks,
    )


def _take_over(job: Job, file: Path, results: Path) -> None:
    """Write the result of another cell's run, which was the same, as this job's."""
    found = read_result(file)
    assert found is not None
    own = {"cell": job.cell.id, "same_run_as": str(file.relative_to(results))}
    write_result(file_of(job, results), found | own, read_outputs(file))


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
    found = _answered(job, result, settings.data, progress=progress)
    measured = {
        "status": "done",
        "scores": {name: each.scores for name, each in found.items()},
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
    answers = {name: each.answers for name, each in found.items()}
    write_result(file_of(job, settings.results), {**known, **measured}, answers)
    shutil.rmtree(out, ignore_errors=True)


def _going_on(config: TrainConfig) -> TrainConfig:
    """The settings that go on with an interrupted run, where there is one."""
    resumes = bool(list_checkpoints(config.out / "checkpoints"))
    return config.model_copy(update={"resume": resumes, "overwrite": not resumes})


def _data_entry(job: Job, data: Data) -> dict[str, Any]:
    rows = {"train": data.training(job), "score": data.scored(job)}
    splits = {"train": "train", "score": job.scoring.split}
    return {
        name: {"source": job.source(splits[name], None), "rows": len(rows[name]), "sha256": found}
        for name, found in data.hashes(job).items()
    }


def _answered(
    job: Job, result: TrainResult, data: Path | None, *, progress: bool
) -> dict[str, Answered]:
    """What a run answers: at its best evaluation, if it has any, and at its end.

    At the evaluation that counts also by other searches.
    """
    scoring = job.scoring
    places = {"best": result.out, "last": result.out / "last"}
    if result.best_step is None:
        del places["best"]
    found = {
        name: answered(job, place, data, scoring.answers, progress=progress)
        for name, place in places.items()
        if name == "last" or result.best_step != result.steps
    }
    # At the end of a run that is best there, both are the same.
    found = {name: found.get(name, found["last"]) for name in places}
    for name, search in scoring.also.items():
        place = places[scoring.epoch]
        found[f"{scoring.epoch}, {name}"] = answered(job, place, data, search, progress=progress)
    return found


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
