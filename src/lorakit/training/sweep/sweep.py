"""Several adapters trained together on one frozen base, each exactly as if alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from lorakit.config.train import TrainConfig
from lorakit.data.batches import pad_token
from lorakit.errors import LorakitError, TrainingError
from lorakit.kernels.choice import use
from lorakit.training.checks import Interruption
from lorakit.training.memory.training_memory import training_memory
from lorakit.training.prepare import Prepared, prepare_all
from lorakit.training.record import SharedBar
from lorakit.training.run import Run, TrainResult, check_free, execute
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
from lorakit.training.trainer import list_checkpoints

TrialThread = CoroutineThread[MicroBatch, Tensor, TrainResult]


def sweep(config: TrainConfig, *, progress: bool = False, table: bool = False) -> SweepResult:
    """Train an adapter for each member of `config.sweep`, all in one batch, as if each were alone.

    Every member has its own Trainer: data order, loss, clipping, optimizer, schedule, evaluation,
    early stop, checkpoints and guardrails are those of `train`, and so is its folder, `out/NAME`.
    Only the forward and backward passes are joint. Gradients equal those of separate runs to
    rounding. With dropout, in the adapter or in the base, the random numbers are others than alone.

    A member that a guardrail stops leaves its last good adapter, and the others go on. Beside the
    members' folders are sweep.json (figures), sweep.md (a table) and sweep.png (score against
    parameters, where matplotlib is installed).

    Args:
        config: the settings; `sweep` says what varies.
        progress: show a bar on stderr.
        table: print on stderr, before the first step, what each member trains and what was read.

    Raises:
        LorakitError: the sweep cannot start, or no member came to its end.
        KeyboardInterrupt: it was interrupted; each member has a checkpoint, the text says how to
            go on.
    """
    trials = trials_of(config)
    finished = _open(config, trials)
    left = {trial.name: trial for trial in trials if trial.name not in finished}
    runs = [_run(left[name], prepared) for name, prepared in _prepare(left).items()]
    if table:
        print("\n".join(_outline(run) for run in runs), file=sys.stderr)
    started = time.perf_counter()
    results = {trial.name: TrialResult(trial, finished.get(trial.name)) for trial in trials}

    def record(name: str, ended: TrialThread) -> None:
        results[name] = TrialResult(results[name].trial, ended.made, ended.error)
        write_figures(_result(config, results, started))

    config.out.mkdir(parents=True, exist_ok=True)
    with use(config.kernels):
        _train(runs, record, progress=progress)
    result = _result(config, results, started)
    write_figures(result)
    write_table_and_plot(result)
    return _checked(result)


def prepare_sweep(config: TrainConfig) -> dict[str, Prepared]:
    """Return what each member of a sweep needs, by its name; nothing is written.

    Raises:
        LorakitError: whatever stands in the way of the sweep.
    """
    return _prepare({trial.name: trial for trial in trials_of(config)})


def describe(prepared: Mapping[str, Prepared]) -> str:
    """Each member's match table and what was read for it, as text."""
    return "\n\n".join(f"{name}\n{each}" for name, each in prepared.items())


def _outline(run: Run) -> str:
    prepared, done = run.prepared, run.steps_done
    return (
        f"{prepared.name}: {prepared.plan.parameters:,} parameters, {prepared.steps} steps"
        f"{f', {done} of them done' if done else ''}; {prepared.training.report}"
    )


def _prepare(trials: Mapping[str, Trial]) -> dict[str, Prepared]:
    if not trials:
        return {}
    return prepare_all({name: trial.config for name, trial in trials.items()})


def _open(config: TrainConfig, trials: Sequence[Trial]) -> dict[str, TrainResult]:
    """The results of members that are finished already, or make sure the folder is free.

    Raises:
        OutputError: the folder is in use.
        TrainingError: there is nothing to resume.
    """
    if not config.resume:
        check_free(config)
        return {}
    finished = read_finished(config.out, trials)
    if not finished and not any(_checkpoints(trial) for trial in trials):
        raise TrainingError(f"{config.out} has no member to resume: leave out --resume")
    return finished


def _checkpoints(trial: Trial) -> list[str]:
    return [str(path) for path in list_checkpoints(trial.config.out / "checkpoints")]


def _run(trial: Trial, prepared: Prepared) -> Run:
    # A sweep that was interrupted early may have members without a checkpoint: they start anew.
    found = list_checkpoints(trial.config.out / "checkpoints") if trial.config.resume else []
    return Run(config=trial.config, prepared=prepared, checkpoint=found[-1] if found else None)


def _train(
    runs: Sequence[Run], record: Callable[[str, TrialThread], None], *, progress: bool
) -> None:
    """Train all runs to their ends, and tell of each when it has ended.

    Raises:
        KeyboardInterrupt: Ctrl-C; each run has saved a checkpoint.
    """
    steps, done = (sum(r.prepared.steps for r in runs), sum(r.steps_done for r in runs))
    with (
        Interruption() as interruption,
        SharedBar(runs=len(runs), steps=steps, done=done, show=progress) as bar,
        training_memory(runs[0].prepared.model, runs[0].config),
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
    unfinished = [n for n, s in threads.items() if isinstance(s.error, KeyboardInterrupt)]
    if unfinished:
        raise KeyboardInterrupt(
            f"{len(unfinished)} of {len(runs)} members are unfinished, and each has saved a "
            f"checkpoint: give --resume to go on. {threads[unfinished[0]].error}"
        )


def _trial(
    run: Run,
    interruption: Interruption,
    bar: SharedBar,
    hand_in: Callable[[MicroBatch], Tensor],
) -> TrainResult:
    make_trainer = partial(TrialTrainer, hand_in=hand_in)
    return execute(run, interruption, bar=bar, make_trainer=make_trainer)


def _take_turns(
    threads: Mapping[str, TrialThread],
    runs: Sequence[Run],
    record: Callable[[str, TrialThread], None],
) -> None:
    """Let each member run until it has a batch, train on all batches at once, and again."""

    def advance(name: str, loss: Tensor | None = None) -> MicroBatch | None:
        asked = threads[name].advance(loss)
        if asked is None:
            record(name, threads[name])
        return asked

    waiting = [batch for name in threads if (batch := advance(name)) is not None]
    while waiting:
        shared = runs[0].prepared
        losses = joint_losses(shared.model, waiting, pad_id=pad_token(shared.tokenizer))
        pairs = zip(waiting, losses, strict=True)
        answered = [advance(batch.name, loss) for batch, loss in pairs]
        waiting = [batch for batch in answered if batch is not None]


def _result(config: TrainConfig, results: Mapping[str, TrialResult], started: float) -> SweepResult:
    seconds = time.perf_counter() - started
    return SweepResult(config=config, trials=tuple(results.values()), seconds=seconds)


def _checked(result: SweepResult) -> SweepResult:
    """The result of a sweep, if it is one.

    Raises:
        TrainingError: no member came to its end.
    """
    errors = {each.name: each.error for each in result.trials if each.error is not None}
    for error in errors.values():
        if not isinstance(error, LorakitError):
            # A defect, or the disk: the others' results are written, but this must not go unseen.
            raise error
    if len(errors) == len(result.trials):
        lines = [f"{name}: {error}" for name, error in errors.items()]
        raise TrainingError.listing("no member of the sweep came to its end", lines)
    return result
