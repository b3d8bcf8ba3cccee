"""Sweeps: several adapters trained together on one frozen base, each as if alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.config.train import TrainConfig
from lorakit.data.batches import pad_token
from lorakit.errors import ConfigError, LorakitError, TrainingError
from lorakit.training.checkpoints import list_checkpoints
from lorakit.training.checks import Interruption
from lorakit.training.cluster import check_cluster, connected, run_tasks
from lorakit.training.loaded_base import LoadedBase, borrowed, settled
from lorakit.training.prepare import Prepared, prepare_all
from lorakit.training.processes import check_alone
from lorakit.training.record import SharedBar
from lorakit.training.resume import settings_to_resume
from lorakit.training.run import Run, TrainResult, check_config, execute, train, while_training
from lorakit.training.run_folder import check_free, locked
from lorakit.training.several import for_each
from lorakit.training.sweep.coroutine_thread import CoroutineThread
from lorakit.training.sweep.grid import Trial, trials_of
from lorakit.training.sweep.joint_step import MicroBatch, TrialTrainer, joint_losses
from lorakit.training.sweep.report import (
    SweepResult,
    TrialResult,
    read_finished,
    write_figures,
    write_table_and_plot,
)
from lorakit.training.trackers import check_trackers

TrialThread = CoroutineThread[MicroBatch, Tensor, TrainResult]
Record = Callable[[str, TrainResult | None, BaseException | None], None]
"""What is done with a trial's result, or its error, when it ends."""


def sweep(
    config: TrainConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    table: bool = False,
) -> SweepResult:
    """Train an adapter for each trial of `config.sweep`, all in one batch, as if each were alone.

    Every trial has its own Trainer: data order, loss, clipping, optimizer, schedule, evaluation,
    early stop, checkpoints and checks are those of `train`, and so is its folder, `out/NAME`.
    Only the forward and backward passes are joint. Gradients equal those of separate runs to
    rounding. With dropout, in the adapter or in the base, the random numbers are others than alone.

    A trial that a check stops leaves its last good adapter, and the others go on. Beside the
    trials' folders are sweep.json (figures), sweep.md (a table) and sweep.png (score against
    parameters, where matplotlib is installed).

    Args:
        config: the settings; `sweep` says what varies.
        model: a loaded base, in place of the one that the settings name. It is left as it was
            found.
        tokenizer: that of the loaded base.
        progress: show a bar on stderr.
        table: print on stderr, before the first step, what each trial trains and what was read.

    Raises:
        LorakitError: the sweep cannot start, or no trial came to its end.
        KeyboardInterrupt: it was interrupted; each trial has a checkpoint, the text says how to
            go on.

    Examples:
        >>> data = lk.DataConfig(train="builtin:places")
        >>> ranks = {"lora.rank": [1, 2]}
        >>> config = lk.TrainConfig(out="out/ranks", data=data, sweep=ranks, steps=2, batch_size=1)
        >>> result = lk.sweep(config, model=model, tokenizer=tokenizer)
        >>> {name: run.parameters for name, run in result.finished.items()}
        {'rank=1': 57600, 'rank=2': 115200}
    """
    check_alone("a sweep")
    check_config(config)
    check_trackers(config.report_to, together=config.ray is None)
    if config.ray is not None:
        if model is not None:
            raise ConfigError("ray trains elsewhere, where `model` of the settings is loaded")
        check_cluster(config.ray)
    with locked(config.out), borrowed(config, model, tokenizer) as base:
        config = settled(config, base)
        return _sweep(config, base, progress=progress, table=table)


def _sweep(
    config: TrainConfig, base: LoadedBase | None, *, progress: bool, table: bool
) -> SweepResult:
    trials = trials_of(config)
    finished = _open(config, trials)
    left = _to_train([trial for trial in trials if trial.name not in finished])
    runs = _runs(left, base)
    if table:
        print("\n".join(_outline(run) for run in runs), file=sys.stderr)
    started = time.perf_counter()
    results = {trial.name: TrialResult(trial, finished.get(trial.name)) for trial in trials}

    def record(name: str, trained: TrainResult | None, error: BaseException | None) -> None:
        results[name] = TrialResult(results[name].trial, trained, error)
        write_figures(_result(config, results, started))

    if runs and config.ray is not None:
        del runs
        _train_on_cluster(left, config, record, progress=progress)
    elif runs:
        _train(runs, record, progress=progress)
    result = _result(config, results, started)
    write_figures(result)
    write_table_and_plot(result)
    return _checked(result)


def prepare_sweep(config: TrainConfig) -> dict[str, Prepared]:
    """Prepare each trial of a sweep, by its name; nothing is written.

    Raises:
        LorakitError: the sweep cannot start; the error lists the problems of each trial.
    """
    return _prepare({trial.name: trial for trial in trials_of(config)})


def describe(prepared: Mapping[str, Prepared], table: str) -> str:
    """The match table of each trial and what was read for it, as text."""
    return "\n\n".join(f"{name}\n{each.describe(table)}" for name, each in prepared.items())


def _outline(run: Run) -> str:
    prepared, done = run.prepared, run.steps_done
    return (
        f"{prepared.name}: {prepared.plan.parameters:,} parameters, {prepared.steps} steps"
        f"{f', {done} of them done' if done else ''}; {prepared.training.report}"
    )


def _prepare(trials: Mapping[str, Trial], base: LoadedBase | None = None) -> dict[str, Prepared]:
    if not trials:
        return {}
    return prepare_all({name: trial.config for name, trial in trials.items()}, base)


def _open(config: TrainConfig, trials: Sequence[Trial]) -> dict[str, TrainResult]:
    """The results of trials that are finished already, or make sure that the folder is free.

    Raises:
        OutputError: the folder is in use.
        TrainingError: there is nothing to resume.
    """
    if not config.resume:
        check_free(config)
        return {}
    finished = read_finished(config.out, trials)
    if not finished and not any(list_checkpoints(t.config.out / "checkpoints") for t in trials):
        raise TrainingError(f"{config.out} has no trial to resume: leave out --resume")
    return finished


def _checkpoint(trial: Trial) -> Path | None:
    """The checkpoint from which a trial goes on.

    A sweep that was interrupted early may have trials without one: they start anew.
    """
    found = list_checkpoints(trial.config.out / "checkpoints") if trial.config.resume else []
    return found[-1] if found else None


def _to_train(trials: Sequence[Trial]) -> dict[str, Trial]:
    """The trials, by name, with the settings to go on with.

    Raises:
        TrainingError: checkpoints were made with other settings; lists those of all trials.
    """

    def with_settings(trial: Trial, name: str) -> Trial:
        checkpoint = _checkpoint(trial)
        return (
            replace(trial, config=settings_to_resume(trial.config, checkpoint))
            if checkpoint
            else trial
        )

    return for_each({trial.name: trial for trial in trials}, with_settings)


def _runs(trials: Mapping[str, Trial], base: LoadedBase | None) -> list[Run]:
    """The runs of trials, prepared."""
    prepared = _prepare(trials, base)

    def run(trial: Trial, name: str) -> Run:
        return Run.of(trial.config, prepared[name], _checkpoint(trial))

    return list(for_each(trials, run).values())


def _train_on_cluster(
    trials: Mapping[str, Trial], config: TrainConfig, record: Record, *, progress: bool
) -> None:
    """Train each trial as a task of a cluster, alone, and call `record` for each that has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C; each run that had begun has saved a checkpoint.
    """
    assert config.ray is not None
    tasks = {name: partial(train, _alone(trial)) for name, trial in trials.items()}
    how: dict[str, Any] = {
        "title": f"training {len(tasks)} adapters",
        "unit": "trial",
        "show": progress,
    }
    try:
        with connected(config.ray):
            for name, trained, error in run_tasks(tasks, cpus=config.ray_cpus, **how):
                record(name, trained, error)
                if isinstance(error, KeyboardInterrupt):
                    raise error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "interrupted, and each trial that had begun has a checkpoint: give --resume to go on"
        ) from None


def _alone(trial: Trial) -> TrainConfig:
    """The settings by which a trial is a run of its own, in the sweep's folder."""
    resumes = _checkpoint(trial) is not None
    return trial.config.model_copy(update={"resume": resumes, "overwrite": not resumes})


def _train(runs: Sequence[Run], record: Record, *, progress: bool) -> None:
    """Train all runs to their ends, and call `record` for each that has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C; each run has saved a checkpoint.
    """
    steps, done = (sum(r.prepared.steps for r in runs), sum(r.steps_done for r in runs))
    with (
        # Trials share the base, and all settings that this reads.
        while_training(runs[0].prepared.model, runs[0].config) as interruption,
        SharedBar(runs=len(runs), steps=steps, done=done, show=progress) as bar,
    ):
        threads = {
            run.prepared.name: TrialThread(
                run.prepared.name, partial(_trial, run, interruption, bar)
            )
            for run in runs
        }
        try:
            _take_turns(threads, runs, record)
        finally:
            for thread in threads.values():
                thread.close()
    unfinished = [n for n, t in threads.items() if isinstance(t.error, KeyboardInterrupt)]
    if unfinished:
        raise KeyboardInterrupt(
            f"{len(unfinished)} of {len(runs)} trials are unfinished, and each has saved a "
            f"checkpoint: give --resume to go on. {threads[unfinished[0]].error}"
        )


def _trial(
    run: Run,
    interruption: Interruption,
    bar: SharedBar,
    submit: Callable[[MicroBatch], Tensor],
) -> TrainResult:
    make_trainer = partial(TrialTrainer, submit=submit)
    return execute(run, interruption, bar=bar, make_trainer=make_trainer)


def _take_turns(
    threads: Mapping[str, TrialThread],
    runs: Sequence[Run],
    record: Record,
) -> None:
    """Let each trial run until it submits a batch, do a joint step with all batches, and repeat."""

    def advance(name: str, loss: Tensor | None = None) -> MicroBatch | None:
        batch = threads[name].advance(loss)
        if batch is None:
            record(name, threads[name].result, threads[name].error)
        return batch

    waiting = [batch for name in threads if (batch := advance(name)) is not None]
    while waiting:
        shared = runs[0].prepared
        losses = joint_losses(shared.model, waiting, pad_id=pad_token(shared.tokenizer))
        pairs = zip(waiting, losses, strict=True)
        following = [advance(batch.name, loss) for batch, loss in pairs]
        waiting = [batch for batch in following if batch is not None]


def _result(config: TrainConfig, results: Mapping[str, TrialResult], started: float) -> SweepResult:
    seconds = time.perf_counter() - started
    return SweepResult(config=config, trials=tuple(results.values()), seconds=seconds)


def _checked(result: SweepResult) -> SweepResult:
    """The result of a sweep in which a trial came to its end.

    Raises:
        TrainingError: no trial came to its end.
    """
    errors = {each.name: each.error for each in result.trials if each.error is not None}
    for error in errors.values():
        if not isinstance(error, LorakitError):
            # A defect, or the disk: the others' results are written, but this must not go unseen.
            raise error
    if len(errors) == len(result.trials):
        lines = [f"{name}: {error}" for name, error in errors.items()]
        raise TrainingError.listing("no trial of the sweep came to its end", lines)
    return result
