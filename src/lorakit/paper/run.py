"""Running jobs: what has no current result is trained, answers, is scored, and is kept."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.bench.environment import environment
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.bench.result import threads
from lorakit.config.paper import PaperRunConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import TrainingError
from lorakit.paper.check import Data, check, notes
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.joint import groups, train_together
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
from lorakit.training.checkpoints import list_checkpoints
from lorakit.training.run import TrainResult, train


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
    for note in remarks:
        print(note, file=sys.stderr)
    if not settings.dry_run:
        with threads(settings.threads):
            _Runner(settings, data, environment(), progress).run(jobs)
    states = {job: state_of(job, settings.results, data=data.hashes(job)) for job in jobs}
    return Done(states=states, notes=remarks)


@dataclass(frozen=True)
class _Runner:
    """What runs jobs one after the other, or several together."""

    settings: PaperRunConfig
    data: Data
    environment: Mapping[str, Any]
    """Commit, versions and hardware as this process began, whatever the checkout becomes."""
    progress: bool

    def run(self, jobs: Sequence[Job]) -> None:
        """Run those that have no current result."""
        left = [job for job in jobs if self._is_left(job)]
        done = 0
        for together in groups(left, self.settings.joint):
            done += len(together)
            names = ", ".join(job.name for job in together)
            print(f"[{done}/{len(left)}] {names}", file=sys.stderr, flush=True)
            # What another cell shares may have been run a moment ago.
            still = [job for job in together if not self._is_taken_over(job)]
            if len(still) == 1:
                self._run_alone(still[0])
            elif still:
                self._run_together(still)

    def _is_left(self, job: Job) -> bool:
        state = state_of(job, self.settings.results, data=self.data.hashes(job))
        return self.settings.redo or state.kind not in ("done", "failed")

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
        out = self.settings.work / job.folder / f"seed-{job.seed}-{job.hash}"
        config = _going_on(job.config(data=self.settings.data, out=out))
        forget_peak()
        try:
            trained: TrainResult | TrainingError = train(config, progress=self.progress)
        except TrainingError as error:
            trained = error
        except KeyboardInterrupt as stop:
            raise _stopped(job.name, stop) from None
        self._keep(job, config, trained, {"resumed": config.resume})
        shutil.rmtree(out, ignore_errors=True)

    def _run_together(self, jobs: Sequence[Job]) -> None:
        """Train several jobs in one batch, each as if alone; then they answer one by one."""
        configs = [job.config(data=self.settings.data, out=Path("out")) for job in jobs]
        out = self.settings.work / "joint" / "-".join(f"{j.hash[:6]}.{j.seed}" for j in jobs)
        forget_peak()
        try:
            trained = train_together(jobs, configs, out, progress=self.progress)
        except KeyboardInterrupt as stop:
            raise _stopped(f"{len(jobs)} runs", stop) from None
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


def _stopped(what: str, stop: KeyboardInterrupt) -> KeyboardInterrupt:
    reason = str(stop).partition(":")[0]
    return KeyboardInterrupt(f"{what}: {reason}; run the same command to go on")
