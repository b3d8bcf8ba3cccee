"""Running jobs: what has no current result is trained, answers, is scored, and is kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.bench.environment import environment
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.bench.result import threads
from lorakit.config.train import TrainConfig
from lorakit.errors import TrainingError
from lorakit.paper.check import Data, check, notes
from lorakit.paper.durations import seconds_of
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.joint import groups, train_together
from lorakit.paper.on_cluster import run_on_cluster
from lorakit.paper.record import answers_of, entry_of_job, entry_of_run
from lorakit.paper.results import (
    State,
    file_of,
    read_outputs,
    read_result,
    same_run,
    state_of,
    write_result,
)
from lorakit.paper.settings import CellChoice, PaperRunConfig
from lorakit.training.checkpoints import list_checkpoints
from lorakit.training.cluster import check_cluster
from lorakit.training.run import TrainResult, train

FINISHED = ("done", "failed")
"""Kinds of states of jobs that need no run."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """The outcome of `paper run`."""

    states: Mapping[Job, State]
    """What there is of each job now, or before a dry run."""
    notes: Sequence[str]
    """What is to be known of the data."""
    seconds: Mapping[Job, float] = field(default_factory=dict)
    """Of a dry run, how long each job that is left takes on one thread, where that is known."""


def run_cells(settings: PaperRunConfig, *, progress: bool) -> Done:
    """Run what settings choose and has no current result, after a check of all of it.

    Raises:
        LorakitError: something is missing or wrong; nothing was run.
        KeyboardInterrupt: it was interrupted; the same command goes on.
    """
    if settings.ray is not None and not settings.dry_run:
        check_cluster(settings.ray)
    problems: list[str] = []
    jobs = jobs_of(settings, problems=problems)
    data = check(settings, jobs, problems)
    remarks = list(notes(data))
    for note in remarks:
        print(note, file=sys.stderr)
    if not settings.dry_run:
        with threads(settings.threads):
            # Results name the threads that they were computed with.
            runner = _Runner(settings, data, environment(), progress)
            if settings.ray is not None:
                left = [job for job in jobs if runner.is_left(job)]
                run_on_cluster(left, settings, run_cells, progress=progress)
            else:
                runner.run(jobs)
    states = {job: state_of(job, settings.results, data=data.hashes(job)) for job in jobs}
    left = [job for job, state in states.items() if state.kind not in FINISHED or settings.redo]
    seconds = {job: seconds_of(job, data) for job in left if settings.dry_run}
    known = {job: each for job, each in seconds.items() if each is not None}
    return Done(states=states, notes=remarks, seconds=known)


@dataclass(frozen=True)
class _Runner:
    """Runs jobs one after the other, or several together."""

    settings: PaperRunConfig
    data: Data
    environment: Mapping[str, Any]
    """Commit, versions and hardware as this process began, whatever the checkout becomes."""
    progress: bool

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those that have no current result."""
        left = [job for job in jobs if self.is_left(job)]
        done = 0
        for together in groups(left, self.settings.joint):
            done += len(together)
            names = ", ".join(job.name for job in together)
            print(f"[{done}/{len(left)}] {names}", file=sys.stderr, flush=True)
            # What another cell shares, or another task starts from, may have been run by now.
            now = [job for job in together if self.settings.redo or self.is_left(job)]
            still = [job for job in now if not self._is_taken_over(job)]
            if len(still) == 1:
                self._run_alone(still[0])
            elif still:
                self._run_together(still)

    def is_left(self, job: Job) -> bool:
        """Whether a job has no current result, or is run again all the same."""
        state = state_of(job, self.settings.results, data=self.data.hashes(job))
        return self.settings.redo or state.kind not in FINISHED

    def _is_taken_over(self, job: Job) -> bool:
        """Whether another cell has a result of the same run, which is then this job's too."""
        results = self.settings.results
        same = None if self.settings.redo else same_run(job, results, self.data.hashes(job))
        found = None if same is None else read_result(same)
        if same is None or found is None:
            return False
        own = {"cell": job.cell.id, "same_run_as": str(same.relative_to(results))}
        write_result(file_of(job, results), found | own, read_outputs(same))
        return True

    def _run_alone(self, job: Job) -> None:
        """Train one job; an adapter that other jobs start from is left in the folder of work."""
        out = self._place(job)
        config = _going_on(job.config(data=self.settings.data, out=out))
        if job.start is not None:
            start = self._started(job.start)
            config = config.model_copy(update={"init_from": str(start), "fresh_head": True})
        forget_peak()
        try:
            trained: TrainResult | TrainingError = train(config, progress=self.progress)
        except TrainingError as error:
            trained = error
        except KeyboardInterrupt as stop:
            raise stopped(job.name, stop) from None
        self._keep(job, config, trained, {"resumed": config.resume})
        if isinstance(trained, TrainResult) and self._is_start(job):
            shutil.rmtree(out / "checkpoints", ignore_errors=True)
            return
        shutil.rmtree(out, ignore_errors=True)

    def _place(self, job: Job) -> Path:
        return self.settings.work / job.folder / f"seed-{job.seed}-{job.hash}"

    def _started(self, start: Job) -> Path:
        """The adapter that another job starts from, trained first where it is not there."""
        place = self._place(start)
        if not (place / "lorakit.json").is_file() or list_checkpoints(place / "checkpoints"):
            self._run_alone(start)
        return place

    def _is_start(self, job: Job) -> bool:
        """Whether a task of the job's cell starts from its adapter."""
        jobs = jobs_of(
            CellChoice(cells=(job.cell.id,), scale=job.scale, variant=job.variant), skip=True
        )
        return any(each.given["starts_from"] == job.task for each in jobs)

    def _run_together(self, jobs: Sequence[Job]) -> None:
        """Train several jobs in one batch, each as if alone; then they answer one by one."""
        configs = [job.config(data=self.settings.data, out=Path("out")) for job in jobs]
        out = self.settings.work / "joint" / "-".join(f"{j.hash[:6]}.{j.seed}" for j in jobs)
        forget_peak()
        try:
            trained = train_together(jobs, configs, out, progress=self.progress)
        except KeyboardInterrupt as stop:
            raise stopped(f"{len(jobs)} runs", stop) from None
        for job, config, each in zip(jobs, configs, trained, strict=True):
            self._keep(job, config, each, {"together": len(jobs)})
        shutil.rmtree(out, ignore_errors=True)

    def _keep(
        self,
        job: Job,
        config: TrainConfig,
        trained: TrainResult | TrainingError,
        how: Mapping[str, Any],
    ) -> None:
        """Have what was trained answer, and write the result; one that diverged is a result too."""
        peak = most_bytes()
        known = {**entry_of_job(job, config, self.data), **self.environment, **how}
        file = file_of(job, self.settings.results)
        if isinstance(trained, TrainingError):
            print(f"{job.name}: {trained}", file=sys.stderr)
            write_result(file, {**known, "status": "failed", "error": str(trained)}, {})
            return
        found = answers_of(job, trained, self.settings.data, progress=self.progress)
        entry = entry_of_run(config, trained, found, peak)
        answers = {name: each.answers for name, each in found.evaluations.items()}
        write_result(file, {**known, "status": "done", **entry}, answers)


def _going_on(config: TrainConfig) -> TrainConfig:
    """The settings that go on with an interrupted run, where there is one."""
    resumes = bool(list_checkpoints(config.out / "checkpoints"))
    return config.model_copy(update={"resume": resumes, "overwrite": not resumes})


def stopped(what: str, stop: KeyboardInterrupt) -> KeyboardInterrupt:
    """What an interrupted run of a cell says in place of its own words."""
    reason = str(stop).partition(":")[0]
    return KeyboardInterrupt(f"{what}: {reason}; run the same command to go on")
