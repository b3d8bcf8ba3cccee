"""One training run, from settings to an adapter folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import extract
from lorakit.config.train import PreferenceSettings, TrainConfig
from lorakit.data.collate import Collator
from lorakit.errors import ConfigError, OutputError, TrainingError
from lorakit.kernels.choice import use
from lorakit.models.base import device_of
from lorakit.routing.route import route
from lorakit.training.card import training_card
from lorakit.training.checkpoints import step_of
from lorakit.training.checks import Interruption, UntrainedParts
from lorakit.training.evaluation import compared, scored
from lorakit.training.loaded_base import borrowed, settled
from lorakit.training.loss import Loss
from lorakit.training.memory.compiled_blocks import compiled_blocks
from lorakit.training.memory.memory_setting import training_memory
from lorakit.training.prepare import Prepared, check_same_work, prepare
from lorakit.training.processes import (
    ShareOfBatch,
    as_in_first,
    check_settings,
    is_first,
    together,
    wait_for_all,
)
from lorakit.training.rates import learning_rates
from lorakit.training.record import JsonLines, LogWithScores, ProgressBar
from lorakit.training.resume import (
    ChangedSetting,
    RunRecord,
    changes_of,
    scored_on_other_rows,
    settings_to_resume,
)
from lorakit.training.run_folder import LOG, find_checkpoint, locked
from lorakit.training.sharded_base import is_sharded, shard_base
from lorakit.training.trackers import check_trackers, reporting
from lorakit.training.trainer import AdapterTrainer, KeepBest, OwnIntervals, make_arguments
from lorakit.training.trl_loss import TrlLoss


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The outcome of a run: where its files are, and its scores."""

    out: Path
    steps: int
    parameters: int
    """Trained values."""
    first_loss: float
    """Mean training loss of the first logged step."""
    last_loss: float
    """Mean training loss since the last but one log."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Validation scores of the adapter in `out`; empty without validation rows."""
    best_step: int | None = None
    seconds: float = 0.0
    """Time in the training loop, evaluation included."""
    padding: float = 0.0
    """Share of the tokens in training batches that only pad rows to one length."""

    @cached_property
    def adapter(self) -> Adapter:
        """The adapter in `out`, read and verified when it is first asked for.

        Raises:
            AdapterFileError: the folder is gone, or not as it was written.
        """
        return Adapter.load(self.out)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that can start: its settings, what was prepared, and the checkpoint to resume from."""

    config: TrainConfig
    prepared: Prepared
    checkpoint: Path | None
    """None: from the first step."""
    changes: tuple[ChangedSetting, ...] = ()
    """What resumptions have changed in its settings."""
    scored_afresh: bool = False
    """Scores of the steps before the checkpoint do not count: they are of other rows."""

    @staticmethod
    def of(config: TrainConfig, prepared: Prepared, checkpoint: Path | None) -> Run:
        """A run from its first step, or from a checkpoint.

        Raises:
            TrainingError: it does not go on from the checkpoint.
        """
        return Run(
            config=config,
            prepared=prepared,
            checkpoint=checkpoint,
            changes=changes_of(config, prepared, checkpoint),
            scored_afresh=scored_on_other_rows(prepared, checkpoint),
        )

    @property
    def steps_done(self) -> int:
        """The steps that were trained before the checkpoint."""
        return step_of(self.checkpoint) if self.checkpoint else 0


def train(
    config: TrainConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    table: bool = False,
) -> TrainResult:
    """Train an adapter as the settings say, and leave it in `config.out`.

    The folder holds the best adapter by validation (the last one, without validation rows), the
    last one in `last/`, resumable checkpoints, `log.jsonl` and, where TensorBoard is installed, its
    record. Identical settings give identical adapter files on one machine; a run that is resumed
    gives the same bytes as one that was never interrupted. Under torchrun the processes train one
    adapter together (docs/scale.md), and the first of them writes it.

    Args:
        config: the settings.
        model: a loaded base, in place of the one that the settings name. It is left as it was
            found: attach the result's adapter to use it.
        tokenizer: that of the loaded base.
        progress: show a bar on stderr.
        table: print on stderr, before the first step, what is adapted and what was read.

    Raises:
        LorakitError: the run cannot start, or a check stopped it.
        KeyboardInterrupt: it was interrupted; a checkpoint is saved, the text says how to go on.

    Examples:
        >>> data = lk.DataConfig(train="builtin:places")
        >>> config = lk.TrainConfig(out="out/new", data=data, steps=2, batch_size=1)
        >>> result = lk.train(config, model=model, tokenizer=tokenizer)
        >>> result.adapter.method, result.parameters
        ('lora', 460800)
    """
    check_config(config)
    if config.sweep is not None:
        raise ConfigError("sweep asks for several adapters: call lk.sweep(config)")
    check_trackers(config.report_to)
    with together(), _locked(config.out), borrowed(config, model, tokenizer) as base:
        config = settled(config, base)
        checkpoint = as_in_first(lambda: find_checkpoint(config))
        if checkpoint:
            config = settings_to_resume(config, checkpoint)
        check_settings(config)
        prepared = prepare(config, base)
        check_same_work(prepared)
        run = Run.of(config, prepared, checkpoint)
        if table and is_first():
            print(prepared.describe(config.table), file=sys.stderr)
        with while_training(prepared.model, config) as interruption:
            return execute(run, interruption, bar=ProgressBar(show=progress and is_first()))


def _locked(folder: Path) -> AbstractContextManager[None]:
    """A run's folder, locked by the process that writes it."""
    return locked(folder) if is_first() else nullcontext()


def check_config(config: object) -> None:
    """Make sure that these are settings of a run that is to be trained.

    Raises:
        ConfigError: they are something else, or only ask what would be trained.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            "a run is described by lk.TrainConfig(out=…, data=lk.DataConfig(train=…), …); "
            f"found {config!r:.60}, a {type(config).__name__}"
        )
    if config.dry_run:
        raise ConfigError(
            "dry_run is for the command line: print(lk.plan(model, config.methods())) shows what "
            "would be adapted"
        )


@contextmanager
def while_training(model: PreTrainedModel, config: TrainConfig) -> Iterator[Interruption]:
    """Set a model up for training inside a `with` block: kernels, memory, compiled blocks, signals.

    Yields:
        What notes Ctrl-C, for `execute`.
    """
    with (
        Interruption() as interruption,
        use(config.kernels),
        training_memory(model, config),
        compiled_blocks(model) if config.compile else nullcontext(),
    ):
        # Last: what comes before looks at whole weights.
        if is_sharded(config):
            shard_base(model)
        yield interruption


def execute(
    run: Run,
    interruption: Interruption,
    *,
    bar: TrainerCallback,
    make_trainer: Callable[..., AdapterTrainer] = AdapterTrainer,
) -> TrainResult:
    """Train from the first step, or from the checkpoint, to the finished folder.

    Args:
        run: the run, whose model is set up by `while_training`.
        interruption: what `while_training` yields.
        bar: the callback that shows progress.
        make_trainer: the class of the trainer, or a function that makes one.

    Raises:
        TrainingError: a check stopped the run; the last good adapter is kept.
        KeyboardInterrupt: it was interrupted; a checkpoint is saved, the text says how to go on.
    """
    # First what may refuse the run: then an earlier run's files are removed.
    trainer = _trainer(run, make_trainer)
    _open_folder(run)
    trainer.add_callback(bar)
    trainer.add_callback(interruption)
    steps = run.prepared.steps
    try:
        seconds = 0.0
        if run.checkpoint and run.steps_done >= steps:
            trainer.restore(run.checkpoint)
        else:
            with reporting(trainer, run.config) if is_first() else nullcontext():
                seconds = trainer.train_from(run.checkpoint)
    except TrainingError as error:
        raise _stopped(error, trainer, run) from None
    except OSError as error:
        raise OutputError(
            f"{run.config.out} cannot be written: {error.strerror or error}; its checkpoints are "
            "kept, from which --resume goes on"
        ) from error
    if interruption.happened and trainer.state.global_step < steps:
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step} of {steps}, which is saved: "
            "give --resume to go on"
        )
    return _finish(run, trainer, seconds)


def _open_folder(run: Run) -> None:
    """Make the folder, and remove an earlier run's files, which this one would be mixed with."""
    if not is_first():
        return
    if run.checkpoint is None:
        for left in ("checkpoints", "last", "tensorboard"):
            shutil.rmtree(run.config.out / left, ignore_errors=True)
    run.config.out.mkdir(parents=True, exist_ok=True)


def _trainer(run: Run, make_trainer: Callable[..., AdapterTrainer]) -> AdapterTrainer:
    config, prepared = run.config, run.prepared
    loss = Loss(
        prepared.task,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        preference=config.preference,
        through=_through(prepared, config.preference),
    )
    plain_loss = Loss(prepared.task, preference=config.preference)
    collate = Collator(prepared.tokenizer)
    validation = prepared.validation
    rates = learning_rates(config, prepared.plan, prepared.rates)

    def scorer(model: torch.nn.Module) -> dict[str, float]:
        assert validation is not None
        with route(model, prepared.name):
            found = scored(
                model,
                validation.examples,
                loss=plain_loss,
                collate=collate,
                batch_size=4 * config.batch_size,
                names=prepared.labels,
                best_by=prepared.best_by,
            )
        return compared(found.scores)

    trainer = make_trainer(
        adapter_name=prepared.name,
        checkpoints=config.out / "checkpoints",
        rates=rates,
        save_record=RunRecord.of(config, prepared, run.changes).save,
        scorer=scorer if validation else None,
        by_length=prepared.packing.by_length,
        model=prepared.model,
        args=make_arguments(config, prepared.steps, learning_rate=max(rates.values())),
        train_dataset=prepared.training,
        eval_dataset=validation,
        data_collator=ShareOfBatch(Collator(prepared.tokenizer, prepared.packing)),
        compute_loss_func=loss,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogWithScores())
    trainer.add_callback(OwnIntervals())
    if is_first():
        trainer.add_callback(JsonLines(config.out / LOG))
    if not config.allow_untrained:
        trainer.add_callback(UntrainedParts(trainer.trained, check_after=config.check_after))
    if validation:
        best = prepared.best_by
        trainer.add_callback(
            KeepBest(
                lambda: _save(run, trainer, config.out),
                metric=best,
                greater=best != "loss",
                patience=config.patience,
                afresh=run.scored_afresh,
            )
        )
    return trainer


def _through(prepared: Prepared, settings: PreferenceSettings) -> TrlLoss | None:
    """What computes the loss in lorakit's place, tried on a row of training."""
    if prepared.task != "preference" or settings.through != "trl":
        return None
    through = TrlLoss(prepared.model, prepared.tokenizer, settings)
    batch = Collator(prepared.tokenizer)(prepared.training.examples[:1])
    del batch["labels"]
    device = device_of(prepared.model)
    through.try_on(prepared.model, {name: each.to(device) for name, each in batch.items()})
    return through


def _save(run: Run, trainer: AdapterTrainer, folder: Path) -> None:
    if not is_first():
        return
    state = trainer.state
    card = training_card(
        run.config, run.prepared, run.changes, step=state.global_step, history=state.log_history
    )
    adapter = extract(run.prepared.model, run.prepared.name)
    replace(adapter, card=card).save(folder, overwrite=True)


def _stopped(error: TrainingError, trainer: AdapterTrainer, run: Run) -> TrainingError:
    """Save the last good adapter of a run that a check stopped, and say in the error where."""
    if not (trainer.last_good and is_first()):
        return error
    trainer.restore_last_good()
    last = run.config.out / "last"
    _save(run, trainer, last)
    return TrainingError(f"{error}\nThe adapter as it last was good is in {last}")


def _finish(run: Run, trainer: AdapterTrainer, seconds: float) -> TrainResult:
    out = run.config.out
    _save(run, trainer, out / "last")
    history = trainer.state.log_history
    best_step = trainer.state.best_global_step
    if run.prepared.validation is None:
        _save(run, trainer, out)
    wait_for_all()
    scores = {
        key.removeprefix("eval_"): value
        for entry in history
        if best_step is not None and entry.get("step") == best_step
        for key, value in entry.items()
        if key.startswith("eval_")
    }
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainResult(
        out=out,
        steps=trainer.state.global_step,
        parameters=run.prepared.plan.parameters,
        first_loss=losses[0],
        last_loss=losses[-1],
        scores=scores,
        best_step=best_step,
        seconds=seconds,
        padding=_padding(history),
    )


def _padding(history: Sequence[Mapping[str, Any]]) -> float:
    """The share of padding among all tokens that were logged."""
    logged = [(entry["tokens"], entry["padding"]) for entry in history if "padding" in entry]
    return sum(n * share for n, share in logged) / max(sum(n for n, _ in logged), 1)
