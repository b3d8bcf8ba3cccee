"""The participants of the benchmark of training, ours and the baselines, on the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from lorakit.attachment.attach import detach, extract
from lorakit.bench.peers import peft_loading, require_peft
from lorakit.bench.result import OURS
from lorakit.bench.train_rounds import (
    ClockedAdapterTrainer,
    ClockedBatchTrainer,
    ClockedLengthTrainer,
    ClockedTrainer,
    Gate,
)
from lorakit.config.base import dtype_name
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.data.samples import Example
from lorakit.routing.route import route
from lorakit.training.evaluation import scored
from lorakit.training.loss import Loss
from lorakit.training.memory.memory_setting import training_memory
from lorakit.training.prepare import Prepared, prepare
from lorakit.training.run import Run, execute, while_training
from lorakit.training.trainer import make_arguments
from lorakit.upstream.private_names import set_compiled_call


@dataclass(frozen=True, kw_only=True)
class ParticipantTask:
    """The work of one participant: what to train, and what to score."""

    config: TrainConfig
    """The run as `lorakit train` reads it; `out` is a folder to work in."""
    held_out: Path
    """Rows to score after the last step, in the form of the training rows."""
    full_learning_rate: float
    """Peak learning rate of full fine-tuning."""


def ours(task: ParticipantTask, gate: Gate) -> float:
    """Train as `lorakit train` does; returns the loss of the held-out rows."""
    prepared = prepare(task.config)
    run = Run(config=task.config, prepared=prepared, checkpoint=None)
    make_trainer = partial(ClockedAdapterTrainer, gate=gate)
    with while_training(prepared.model, task.config) as interruption:
        execute(run, interruption, bar=TrainerCallback(), make_trainer=make_trainer)
    with route(prepared.model, prepared.name):
        return _held_out_loss(prepared.model, prepared, task)


def full(task: ParticipantTask, gate: Gate) -> float:
    """Train every weight of the base, in its precision, with our batches, attention and loss."""
    prepared = prepare(task.config)
    model = prepared.model
    detach(model)
    model.requires_grad_(True)
    config = task.config.model_copy(update={"learning_rate": task.full_learning_rate})
    trainer = ClockedBatchTrainer(
        gate=gate,
        model=model,
        by_length=prepared.packing.by_length,
        args=_peers_arguments(config, prepared.steps),
        train_dataset=prepared.training,
        data_collator=Collator(prepared.tokenizer, prepared.packing),
        compute_loss_func=Loss(prepared.task),
    )
    with training_memory(model, config):
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return _held_out_loss(model, prepared, task)


def peft(
    task: ParticipantTask, gate: Gate, *, compiled: bool = False, by_length: bool = False
) -> float:
    """Train with PEFT and transformers' Trainer, from the same A, padded to the longest row."""
    prepared = prepare(task.config)
    model = _peft_model(prepared, task.config)
    if compiled:
        model.compile()
    trainer_class = ClockedLengthTrainer if by_length else ClockedTrainer
    trainer = trainer_class(
        gate=gate,
        model=model,
        args=_peers_arguments(task.config, prepared.steps),
        train_dataset=prepared.training,
        data_collator=_peers_collator(prepared),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # Scoring is not part of training, and would be compiled separately.
    set_compiled_call(model, None)
    return _held_out_loss(model, prepared, task)


BY_LENGTH = "peft_by_length"
"""The participant with batches of its own: of the same rows, those of similar length together."""

PARTICIPANTS: dict[str, Callable[[ParticipantTask, Gate], float]] = {
    OURS: ours,
    "compiled": ours,
    "peft": peft,
    BY_LENGTH: partial(peft, by_length=True),
    "peft_compiled": partial(peft, compiled=True),
    "full": full,
}
"""Each participant by its name: trains with the gate, returns the loss of the held-out rows."""


def _peft_model(prepared: Prepared, config: TrainConfig) -> Any:
    """PEFT's model around our base, with an adapter that starts from the values of ours."""
    start = extract(prepared.model, prepared.name).save(config.out / "start")
    detach(prepared.model)
    how = peft_loading(dtype_name(config.lora.dtype))
    return require_peft().PeftModel.from_pretrained(prepared.model, start, is_trainable=True, **how)


def _peers_collator(prepared: Prepared) -> Callable[[list[Example]], Any]:
    """A collator that pads every row to the longest one."""
    pad = DataCollatorForSeq2Seq(prepared.tokenizer)

    def collate(examples: list[Example]) -> Any:
        return pad(
            [
                {
                    "input_ids": example.input_ids,
                    "attention_mask": [1] * len(example.input_ids),
                    "labels": example.labels,
                }
                for example in examples
            ]
        )

    return collate


def _peers_arguments(config: TrainConfig, steps: int) -> TrainingArguments:
    """The arguments of our run without its checkpoints, which of a full model are big."""
    arguments = make_arguments(config, steps)
    arguments.save_strategy = SaveStrategy.NO
    return arguments


def _held_out_loss(model: nn.Module, prepared: Prepared, task: ParticipantTask) -> float:
    """The mean loss of the target tokens of the held-out rows."""
    data: DataConfig = task.config.data
    rows = encode_rows(read_rows(str(task.held_out), data), prepared.tokenizer, data)
    found = scored(
        model,
        rows.examples,
        loss=Loss(prepared.task),
        collate=Collator(prepared.tokenizer),
        batch_size=task.config.batch_size,
    )
    return found.scores["loss"]
