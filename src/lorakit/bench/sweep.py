"""Training many adapters in one batch against training them one after the other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit.attachment.attach import adapter_parameters, attach
from lorakit.bench.memory import peak_bytes
from lorakit.bench.peers import require_peft
from lorakit.bench.result import OURS, Findings, Goal, threads
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.config.bench import SweepConfig
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig
from lorakit.data.batches import pad_token
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.data.samples import Example
from lorakit.errors import DataError
from lorakit.models.load import load_model
from lorakit.training.lm_loss import item_weight, text_losses
from lorakit.training.loss import Loss
from lorakit.training.sweep.joint_step import MicroBatch, joint_losses

LEARNING_RATE = 1e-3


def measure_sweep(settings: SweepConfig) -> Findings:
    """The times of a step of all adapters, and the memory that it takes."""
    ways = [OURS, "separate", *(["peft"] if settings.peer else [])]
    seconds = interleaved(
        {way: Participant(run=WAYS[way](settings)) for way in ways}, repeats=settings.repeats
    )
    memory = _memory(settings, ways) if settings.memory else {}
    return Findings(timings={"step": seconds}, goals=_goals(seconds, memory), memory=memory)


def joint(settings: SweepConfig) -> Callable[[], list[float]]:
    """A training step of all adapters in one batch, which returns each adapter's loss."""
    model, tokenizer = load_model(settings.model, dtype=settings.dtype)
    groups = _examples(settings, tokenizer)
    names = [f"adapter-{number}" for number in range(len(groups))]
    for name in names:
        attach(model, _lora(settings), name=name)
    model.train()
    collate, loss = Collator(tokenizer), Loss("generation")
    batches = [
        MicroBatch(name=name, inputs=collate(rows), loss=loss, items=None)
        for name, rows in zip(names, groups, strict=True)
    ]
    optimizer = _optimizer(p for name in names for _, p in adapter_parameters(model, name))

    def step() -> list[float]:
        losses = joint_losses(model, batches, pad_id=pad_token(tokenizer))
        optimizer.step()
        optimizer.zero_grad()
        return [loss.item() for loss in losses]

    return step


def separate(settings: SweepConfig) -> Callable[[], list[float]]:
    """A training step of one adapter after the other, each with its own rows.

    A single adapter takes all of these steps: the time does not depend on its weights.
    """
    model, tokenizer = load_model(settings.model, dtype=settings.dtype)
    attach(model, _lora(settings))
    return _one_by_one(model, tokenizer, settings)


def peft_separate(settings: SweepConfig) -> Callable[[], list[float]]:
    """The step of `separate` with PEFT's adapter and the same loss."""
    peft = require_peft()
    base, tokenizer = load_model(settings.model, dtype=settings.dtype)
    lora = peft.LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
    float32 = settings.adapter_dtype == "float32"
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=float32)
    return _one_by_one(model, tokenizer, settings)


WAYS: dict[str, Callable[[SweepConfig], Callable[[], list[float]]]] = {
    OURS: joint,
    "separate": separate,
    "peft": peft_separate,
}
"""The step of each participant, by its name."""


def _one_by_one(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: SweepConfig
) -> Callable[[], list[float]]:
    """One training step after the other, with the model's adapter, on the rows of each."""
    collate = Collator(tokenizer)
    batches = [collate(rows) for rows in _examples(settings, tokenizer)]
    optimizer = _optimizer(p for p in model.parameters() if p.requires_grad)
    model.train()

    def step() -> list[float]:
        found: list[float] = []
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            weight = item_weight(batch["labels"], None)
            value, _ = text_losses(model, inputs, batch["labels"], weights=weight)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(value.item())
        return found

    return step


def _lora(settings: SweepConfig) -> LoRAConfig:
    return LoRAConfig(rank=settings.rank, targets=("all-linear",), dtype=settings.adapter_dtype)


def _examples(settings: SweepConfig, tokenizer: PreTrainedTokenizerBase) -> list[Sequence[Example]]:
    """The rows of each adapter, different for each.

    Raises:
        DataError: there are too few.
    """
    data, per_adapter = DataConfig(), settings.rows
    needed = settings.adapters * per_adapter
    examples = encode_rows(read_rows(settings.task, data, limit=needed), tokenizer, data).examples
    if len(examples) < needed:
        raise DataError(
            f"{settings.adapters} adapters with {per_adapter} rows each need {needed} rows, but "
            f"{settings.task} has {len(examples)}: request fewer, or give another task"
        )
    return [examples[start : start + per_adapter] for start in range(0, needed, per_adapter)]


def _optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=LEARNING_RATE, weight_decay=0.0)


def _memory(settings: SweepConfig, ways: Sequence[str]) -> dict[str, int]:
    """The largest resident set of a process that trains as each participant; {} off Linux."""
    start_afresh = multiprocessing.get_context("spawn")
    found = {}
    for way in ways:
        with ProcessPoolExecutor(max_workers=1, mp_context=start_afresh) as process:
            found[way] = process.submit(_peak_bytes_of, way, settings).result()
    return {way: peak for way, peak in found.items() if peak is not None}


def _peak_bytes_of(way: str, settings: SweepConfig) -> int | None:
    """The largest resident set of this process after two steps."""
    with threads(settings.threads):
        step = WAYS[way](settings)
        step()
        step()
    return peak_bytes()


def _goals(seconds: dict[str, Seconds], memory: dict[str, int]) -> tuple[Goal, ...]:
    faster = seconds["separate"].median / seconds[OURS].median
    goals = [
        Goal(what="joint step, times faster than separate", got=faster, limit=1.5, at_least=True)
    ]
    if memory:
        goals.append(
            Goal(what="memory against one run", got=memory[OURS] / memory["separate"], limit=1.5)
        )
    return tuple(goals)
