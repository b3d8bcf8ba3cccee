"""transformers' Trainer for adapters: checkpoints, resuming, scoring, a check of each loss."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import adapter_parameters, extract
from lorakit.config.seed import generator_seed
from lorakit.config.train import TrainConfig
from lorakit.errors import OutputError, TrainingError
from lorakit.methods.lora.pissa import split_frozen_factors
from lorakit.training.batch_trainer import BatchTrainer
from lorakit.training.checkpoints import list_checkpoints, step_of
from lorakit.training.processes import copy_from_first, explained_in_model, is_first
from lorakit.training.rates import split_by_rate

Scorer = Callable[[nn.Module], dict[str, float]]
"""A function that scores the model as it is now."""


class AdapterTrainer(BatchTrainer):
    """Trains one adapter of a model. A checkpoint holds the adapter, and is complete or absent."""

    def __init__(
        self,
        *,
        adapter_name: str,
        checkpoints: Path,
        scorer: Scorer | None,
        rates: Mapping[str, float],
        save_record: Callable[[Path], None],
        **kwargs: Any,
    ) -> None:
        """Prepare training.

        Args:
            adapter_name: the name of the adapter in the model.
            checkpoints: the folder of the checkpoints.
            scorer: what scores the validation rows, if there are any.
            rates: the peak learning rate of each tensor, by its name.
            save_record: what writes the record of the run into a checkpoint's folder.
            kwargs: arguments of transformers' Trainer.
        """
        super().__init__(**kwargs)
        self.save_record = save_record
        self.rates = rates
        self.adapter_name = adapter_name
        self.checkpoints = checkpoints
        self.scorer = scorer
        self.weights = dict(adapter_parameters(self.adapted, adapter_name))
        self.trained = {name: p for name, p in self.weights.items() if p.requires_grad}
        self.last_good: dict[str, Tensor] = {}
        copy_from_first(self.weights.values())

    def train_from(self, checkpoint: Path | None) -> float:
        """Train to the end, from a checkpoint if there is one, and return the seconds it took."""
        with explained_in_model():
            outcome = self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return outcome.metrics["train_runtime"]

    def restore(self, checkpoint: Path) -> None:
        """Load the weights and the log of a checkpoint without training on."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def check_loss(self, loss: Tensor) -> None:
        """Copy the weights that gave a loss, as the last good ones.

        Raises:
            TrainingError: the loss is not finite.
        """
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1}: "
                "try a smaller learning_rate or more warmup_steps"
            )
        if not self.last_good:
            self.last_good = {name: torch.empty_like(p) for name, p in self.trained.items()}
        with torch.no_grad():
            for name, good in self.last_good.items():
                good.copy_(self.trained[name])

    def restore_last_good(self) -> None:
        """Restore the weights that last gave a finite loss."""
        with torch.no_grad():
            for name, good in self.last_good.items():
                self.trained[name].copy_(good)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer, in which each tensor has its own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            split_by_rate(optimizer, self.trained, self.rates)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The names of the parameters that weight decay applies to: matrices, no biases or norms.

        Trainer infers that from the names of parameters, and these contain the adapter's name.
        """
        decayed = {id(parameter) for parameter in self.trained.values() if parameter.dim() > 1}
        return [name for name, parameter in model.named_parameters() if id(parameter) in decayed]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the validation rows, log the scores, and tell the callbacks."""
        assert self.scorer is not None
        training = self.adapted.training
        scores = {f"eval_{name}": value for name, value in self.scorer(self.adapted).items()}
        self.adapted.train(training)
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics=scores
        )
        return scores

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        assert output_dir is not None
        extract(self.adapted, self.adapter_name).save(output_dir, overwrite=True)
        self.save_record(Path(output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        # Trainer writes a checkpoint file by file; it is in this folder until it is complete.
        return str(self.checkpoints / ".unfinished")

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not is_first():
            return
        staging = Path(self._get_output_dir(trial))
        shutil.rmtree(staging, ignore_errors=True)
        try:
            self._fill_checkpoint(staging, model, trial)
        # torch's writer and that of safetensors have errors of their own for a full disk.
        except (OSError, RuntimeError, SafetensorError, OutputError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._unwritten(error) from error
        for old in list_checkpoints(self.checkpoints)[: -(self.args.save_total_limit or 1)]:
            shutil.rmtree(old)

    def _unwritten(self, error: Exception) -> OutputError:
        """The error of a checkpoint that could not be written, with what is kept."""
        kept = list_checkpoints(self.checkpoints)
        # The reason of a failed write is at the end of a chain of errors; torch's is of many lines.
        reason = error.__cause__ or error
        said = getattr(reason, "strerror", None) or next(iter(str(reason).splitlines()), "")
        free = shutil.disk_usage(self.checkpoints).free
        return OutputError(
            f"the checkpoint of step {self.state.global_step} could not be written to "
            f"{self.checkpoints}, where {free:,} bytes are free: {said}. "
            + (
                f"That of step {step_of(kept[-1])} is kept: make room, and give --resume to go on"
                if kept
                else "It would have been the first: make room, and start again with --overwrite"
            )
        )

    def _fill_checkpoint(self, staging: Path, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint into a folder for unfinished ones, and move it to its place."""
        staging.mkdir(parents=True)
        super()._save_checkpoint(model, trial)
        (made,) = staging.iterdir()
        for file in made.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        final = self.checkpoints / made.name
        shutil.rmtree(final, ignore_errors=True)
        made.rename(final)
        staging.rmdir()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        saved = Adapter.load(resume_from_checkpoint)
        _check_same(saved, extract(self.adapted, self.adapter_name), resume_from_checkpoint)
        tensors = split_frozen_factors(saved.sites, saved.tensors)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(tensors[name])


def _check_same(saved: Adapter, wanted: Adapter, checkpoint: str) -> None:
    """Make sure that a checkpoint is of the adapter that the settings describe.

    Raises:
        TrainingError: it is of another adapter.
    """
    before, now = (
        {f"{c.method}: {name}": value for c in each.configs for name, value in c}
        for each in (saved, wanted)
    )
    moved = saved.base and wanted.base and saved.base.difference(wanted.base)
    problems = [f"the base is another one: {moved}"] if moved else []
    problems += [
        f"{name} is {now.get(name, 'not set')}, and was {before.get(name, 'not set')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    ranks = {site.name: site.rank for site in saved.sites}
    if not problems:
        other = [site.name for site in wanted.sites if ranks.get(site.name) != site.rank]
        problems = [f"{name} has another rank" for name in other]
    if problems:
        raise TrainingError.listing(
            f"{checkpoint} can't be resumed with other settings of what is trained; give those "
            "that it was started with, or --overwrite to start anew",
            problems,
        )


def make_arguments(
    config: TrainConfig, steps: int, *, learning_rate: float | None = None
) -> TrainingArguments:
    """Trainer's arguments for so many steps, at the rate that is given or that of the settings."""
    rate = learning_rate or config.learning_rate
    assert rate is not None
    every = config.eval_every
    return TrainingArguments(
        output_dir=str(config.out),
        run_name=config.out.absolute().name,
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_of(steps),
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch",
        seed=generator_seed(config.seed),
        eval_strategy="no" if config.data.validation is None else "steps" if every else "epoch",
        eval_steps=every,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep_checkpoints,
        logging_steps=10,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )


class OwnIntervals(TrainerCallback):
    """Has a resumed run evaluate and save at its own intervals, not at those of its checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Replace the intervals that came with the checkpoint's state."""
        state.compute_steps(args, state.max_steps)


class KeepBest(TrainerCallback):
    """Saves the adapter whenever its score is the best so far; stops a run that has lost patience.

    Of equal scores the one with the lower loss is the better, and where that is equal too, or not
    known, the earlier one. The best score and all losses are in Trainer's own state, so that a
    resumed run continues from them.
    """

    def __init__(
        self,
        save: Callable[[], None],
        *,
        metric: str,
        greater: bool,
        patience: int | None,
        afresh: bool = False,
    ) -> None:
        """Compare by a metric; `afresh`: the scores of the steps before do not count."""
        self._save = save
        self._metric = f"eval_{metric}"
        self._greater = greater
        self._patience = patience
        self._afresh = afresh

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the best score, where it is of other rows or is another score."""
        if self._afresh or not any(self._metric in entry for entry in state.log_history):
            state.best_metric = state.best_global_step = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Have the last step scored too, where the interval leaves it out."""
        if args.eval_strategy == IntervalStrategy.STEPS and state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the newest score with the best."""
        scores: Mapping[str, float] = kwargs["metrics"]
        if self._is_better(scores, state):
            state.best_metric, state.best_global_step = scores[self._metric], state.global_step
            self._save()
        elif self._patience is not None:
            since = [
                entry
                for entry in state.log_history
                if self._metric in entry and entry["step"] > (state.best_global_step or 0)
            ]
            control.should_training_stop |= len(since) >= self._patience

    def _is_better(self, scores: Mapping[str, float], state: TrainerState) -> bool:
        score, best = scores[self._metric], state.best_metric
        if best is None:
            return True
        if score != best:
            return score > best if self._greater else score < best
        losses = [
            entry["eval_loss"]
            for entry in state.log_history
            if entry["step"] == state.best_global_step and "eval_loss" in entry
        ]
        return bool(losses) and scores.get("eval_loss", losses[-1]) < losses[-1]
