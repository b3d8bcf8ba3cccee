"""One training run, from settings to an adapter folder."""

from __future__ import annotations

import math
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback

from lorakit.adapter import Adapter
from lorakit.attach import attach, extract
from lorakit.config import TrainConfig
from lorakit.errors import ConfigError, DataError, OutputError, TrainingError
from lorakit.matching import Plan
from lorakit.models.load import load_model
from lorakit.tasks.encode import Encoded, encode_rows
from lorakit.tasks.kinds import Rows
from lorakit.tasks.rows import read_rows
from lorakit.train.collate import Collator
from lorakit.train.evaluation import score
from lorakit.train.guards import Interruption, UntrainedParts
from lorakit.train.loss import Loss
from lorakit.train.record import JsonLines, ProgressBar, tensorboard
from lorakit.train.trainer import AdapterTrainer, KeepBest, list_checkpoints, make_arguments

NAME = "default"
"""What the trained adapter is called inside the model."""
BEST_BY = {"generation": "loss", "classification": "accuracy", "regression": "pearson"}
"""The score that decides which adapter is the best, by task."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run made."""

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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything that a run needs, checked before its first step."""

    task: str
    kind: str
    """What a row is: prompt, messages, text or classification."""
    labels: tuple[str, ...] | None
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    training: Encoded
    validation: Encoded | None


def prepare(config: TrainConfig) -> Prepared:
    """Read the rows, load the base and attach the adapter; nothing is written.

    Raises:
        LorakitError: whatever stands in the way of the run.
    """
    if config.data.train is None:
        raise ConfigError("data.train must say which rows to train on")
    data = config.data
    regression = config.task == "regression"
    rows = read_rows(config.data.train, data, limit=data.train_rows, regression=regression)
    held_out = None
    if data.validation is not None:
        held_out = read_rows(
            data.validation,
            data,
            limit=data.validation_rows,
            split="validation",
            labels=rows.labels,
            regression=regression,
        )
    task = _task(config, rows)
    set_seed(config.seed)
    model, tokenizer = load_model(config.model, dtype=config.dtype, task=task, labels=rows.labels)
    training = encode_rows(rows, tokenizer, data)
    validation = None if held_out is None else encode_rows(held_out, tokenizer, data)
    # Seeded once more, so that the start of A does not hang on how the model was loaded.
    set_seed(config.seed)
    plan = _attach(model, config)
    return Prepared(
        task=task,
        kind=rows.kind,
        labels=rows.labels,
        model=model,
        tokenizer=tokenizer,
        plan=plan,
        training=training,
        validation=validation,
    )


def _task(config: TrainConfig, rows: Rows) -> str:
    found = "classification" if rows.kind == "classification" else "generation"
    if config.task == "auto":
        return found
    if (config.task == "generation") != (found == "generation"):
        raise DataError(f"task is {config.task}, but {rows.source} has {rows.kind} rows")
    return config.task


def _attach(model: PreTrainedModel, config: TrainConfig) -> Plan:
    if config.init_from is None:
        return attach(model, config.lora, name=NAME)
    start = Adapter.load(config.init_from)
    return attach(model, start, name=NAME, trainable=True, allow_other_base=config.allow_other_base)


def train(config: TrainConfig, *, progress: bool = False, table: bool = False) -> TrainResult:
    """Train an adapter as the settings say, and leave it in `config.out`.

    The folder holds the best adapter by validation (the last one, without validation rows), the
    last one in `last/`, resumable checkpoints, `log.jsonl` and, where TensorBoard is installed, its
    record. Identical settings give identical adapter files on one machine; a run that is resumed
    gives the same bytes as one that was never interrupted.

    Args:
        config: the settings.
        progress: show a bar on stderr.
        table: print on stderr, before the first step, what is adapted and what was read.

    Raises:
        LorakitError: the run cannot start, or a guardrail stopped it.
        KeyboardInterrupt: it was interrupted; a checkpoint is saved, the text says how to go on.
    """
    checkpoint = _open_folder(config)
    prepared = prepare(config)
    if table:
        print(describe(prepared), file=sys.stderr)
    steps = _steps(config, len(prepared.training.examples))
    config.out.mkdir(parents=True, exist_ok=True)
    trainer = _trainer(config, prepared, steps, progress=progress)
    try:
        with Interruption() as interruption:
            trainer.add_callback(interruption)
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        raise _stopped(error, trainer, config, prepared) from None
    if interruption.happened and trainer.state.global_step < steps:
        raise KeyboardInterrupt(
            f"stopped after step {trainer.state.global_step} of {steps}, which is saved: "
            "give --resume to go on"
        )
    return _finish(config, prepared, trainer, outcome.metrics["train_runtime"])


def describe(prepared: Prepared) -> str:
    """Return the match table and what was read, as text."""
    parts = [str(prepared.plan), f"training rows: {prepared.training.report}"]
    if prepared.validation is not None:
        parts.append(f"validation rows: {prepared.validation.report}")
    return "\n".join(parts)


def _open_folder(config: TrainConfig) -> Path | None:
    """Return the checkpoint to resume from, or make sure that the folder is free.

    Raises:
        OutputError: the folder is in use.
        TrainingError: there is nothing to resume.
    """
    checkpoints = list_checkpoints(config.out / "checkpoints")
    if config.resume:
        if not checkpoints:
            raise TrainingError(f"{config.out} has no checkpoint to resume: leave out --resume")
        return checkpoints[-1]
    if config.out.exists() and any(config.out.iterdir()):
        if not config.overwrite:
            raise OutputError(
                f"{config.out} exists and is not empty: choose another folder, or give --resume to "
                "go on with its run or --overwrite to replace it"
            )
        for left in ("checkpoints", "last", "tensorboard"):
            shutil.rmtree(config.out / left, ignore_errors=True)
    return None


def _steps(config: TrainConfig, rows: int) -> int:
    per_epoch = math.ceil(math.ceil(rows / config.batch_size) / config.accumulate)
    steps = config.steps or math.ceil(per_epoch * config.epochs)
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"warmup_steps {config.warmup_steps} leaves nothing of the run's {steps} steps: "
            "lower it, or train for longer"
        )
    return steps


def _trainer(
    config: TrainConfig, prepared: Prepared, steps: int, *, progress: bool
) -> AdapterTrainer:
    loss = Loss(prepared.task, label_smoothing=config.label_smoothing)
    plain_loss = Loss(prepared.task)
    collate = Collator(prepared.tokenizer, prepared.model, task=prepared.task)
    validation = prepared.validation

    def scorer(model: torch.nn.Module) -> dict[str, float]:
        assert validation is not None
        return score(
            model,
            validation.examples,
            loss=plain_loss,
            collate=collate,
            batch_size=4 * config.batch_size,
        )

    if config.gradient_checkpointing:
        _checkpoint_activations(prepared.model)
    trainer = AdapterTrainer(
        adapter_name=NAME,
        checkpoints=config.out / "checkpoints",
        scorer=scorer if validation else None,
        model=prepared.model,
        args=make_arguments(config, steps),
        train_dataset=prepared.training,
        eval_dataset=validation,
        data_collator=collate,
        compute_loss_func=loss,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(JsonLines(config.out / "log.jsonl"))
    trainer.add_callback(ProgressBar(show=progress))
    trainer.add_callback(tensorboard(config.out / "tensorboard"))
    if not config.allow_untrained:
        trainer.add_callback(UntrainedParts(NAME, check_after=config.check_after))
    if validation:
        best = BEST_BY[prepared.task]
        trainer.add_callback(
            KeepBest(
                lambda: _save(config, prepared, trainer, config.out),
                metric=best,
                greater=best != "loss",
                patience=config.patience,
            )
        )
    return trainer


def _checkpoint_activations(model: PreTrainedModel) -> None:
    # transformers 5.23 gave the method a new name and warns about the old one.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model.config.use_cache = False


def _save(config: TrainConfig, prepared: Prepared, trainer: AdapterTrainer, folder: Path) -> None:
    card = training_card(config, prepared, trainer.state.global_step, trainer.state.log_history)
    adapter = extract(prepared.model, NAME)
    replace(adapter, card=card).save(folder, overwrite=True)


def training_card(
    config: TrainConfig, prepared: Prepared, step: int, history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return how an adapter came to be; the same for identical runs, so no dates and no times."""
    settings = config.model_dump(
        mode="json",
        exclude={"out", "resume", "overwrite", "dry_run", "lora", "data", "model", "task"},
    )
    scores = [e for e in history if any(key.startswith("eval_") for key in e)]
    return {
        "task": prepared.task,
        "task_type": "CAUSAL_LM" if prepared.task == "generation" else "SEQ_CLS",
        "rows_kind": prepared.kind,
        "labels": None if prepared.labels is None else list(prepared.labels),
        "data": config.data.model_dump(mode="json"),
        "rows": {
            "training": len(prepared.training.examples),
            "validation": len(prepared.validation.examples) if prepared.validation else 0,
        },
        "settings": settings,
        "step": step,
        "scores": {
            name.removeprefix("eval_"): value
            for name, value in (scores[-1] if scores else {}).items()
            if name.startswith("eval_") and math.isfinite(value)
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("lorakit", "torch", "transformers")},
        },
    }


def _stopped(
    error: TrainingError, trainer: AdapterTrainer, config: TrainConfig, prepared: Prepared
) -> TrainingError:
    """Keep the last good adapter of a run that a guardrail stopped, and say where it is."""
    if not trainer.last_good:
        return error
    trainer.restore_last_good()
    _save(config, prepared, trainer, config.out / "last")
    return TrainingError(f"{error}\nThe adapter as it last was good is in {config.out / 'last'}")


def _finish(
    config: TrainConfig, prepared: Prepared, trainer: AdapterTrainer, seconds: float
) -> TrainResult:
    _save(config, prepared, trainer, config.out / "last")
    history = trainer.state.log_history
    best_step = trainer.state.best_global_step
    if prepared.validation is None:
        _save(config, prepared, trainer, config.out)
    scores = {
        key.removeprefix("eval_"): value
        for entry in history
        if best_step is not None and entry.get("step") == best_step
        for key, value in entry.items()
        if key.startswith("eval_")
    }
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainResult(
        out=config.out,
        steps=trainer.state.global_step,
        parameters=prepared.plan.parameters,
        first_loss=losses[0],
        last_loss=losses[-1],
        scores=scores,
        best_step=best_step,
        seconds=seconds,
    )
