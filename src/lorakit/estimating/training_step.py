"""One training step without values: the code of a run on the meta device, and what it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.attachment.attach import adapter_parameters, attach
from lorakit.attachment.plan import Plan
from lorakit.attachment.state import virtual_tokens
from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.config.train import TrainConfig
from lorakit.data.collate import PACKED, Collator
from lorakit.data.samples import Example
from lorakit.estimating.counter import StepCounter, fused_attention
from lorakit.kernels.choice import use
from lorakit.kernels.stand_in import DeviceKind, standing_for
from lorakit.models.attention import attention_within
from lorakit.models.quantized import base_tensors
from lorakit.models.shape import is_causal
from lorakit.routing.route import route
from lorakit.training.lm_loss import item_weight, text_losses
from lorakit.training.loss import Loss
from lorakit.training.memory.memory_setting import training_memory
from lorakit.training.prepare import NAME, packing_of

META = torch.device("meta")
SETTLED = 2
"""Steps of which the last counts, with checkpointing, which saves less from the second on."""


@dataclass(frozen=True, kw_only=True)
class CountedStep:
    """The figures of one training step."""

    peak_bytes: Mapping[str, int]
    """What lives at the peak, by the kinds of `KINDS`."""
    flops: int
    """Of the forward and the backward pass, all batches of an optimizer step together."""
    moved_bytes: int
    operations: int
    tokens: int
    """Of the step's batches, padding included."""
    block_bytes: int
    """The weights of the largest block."""
    outside_bytes: int
    """The weights in no block: input embedding and head."""
    plan: Plan

    @property
    def total_bytes(self) -> int:
        """All that lives at the peak."""
        return sum(self.peak_bytes.values())


def count_step(
    model: PreTrainedModel,
    config: TrainConfig,
    examples: Sequence[Example],
    *,
    task: str,
    device: DeviceKind,
) -> CountedStep:
    """Count a training step on the rows of one batch.

    Args:
        model: the base on the meta device, to which an adapter is attached.
        config: the settings of the run.
        examples: the rows of the batch.
        task: generation, classification or regression.
        device: the kind of device that it would run on.

    Raises:
        TargetError: the settings name a layer that the model lacks.
    """
    with standing_for(device):
        packing = packing_of(model, task, config)
        plan = attach(model, [_without_data(each) for each in config.methods()])
        tokens = virtual_tokens(model, NAME)
        rows = examples if tokens is None else [tokens.into(each) for each in examples]
        batch = Collator(None, packing)(rows)
        weights = [p for _, p in adapter_parameters(model, NAME)]
        step = _Step(model, config, weights, task=task, device=device)
        counter = StepCounter(vocabulary=getattr(model.config, "vocab_size", None))
        counter.hold(base_tensors(model), "weights")
        counter.hold(weights, "adapter")
        model.train()
        # transformers makes no masks where no row is padded.
        is_even = len({len(each.input_ids) for each in examples}) == 1
        attention = fused_attention(causal=is_causal(model) if is_even else None)
        prompt = nullcontext() if tokens is None else _as_if_in_rows(model)
        with use(config.kernels), training_memory(model, config), prompt, counter, attention:
            step.prepare(counter)
            for _ in range(1 if config.memory == "fast" else SETTLED):
                counter.begin()
                step.run(counter, batch)
    blocks = blocks_of(model)
    inside = {each for block in blocks for each in block.parameters()}
    return CountedStep(
        peak_bytes=counter.at_peak,
        flops=counter.flops,
        moved_bytes=counter.moved_bytes,
        operations=counter.operations,
        tokens=batch["input_ids"].numel() * config.accumulate,
        block_bytes=max((_frozen_bytes(each.parameters()) for each in blocks), default=0),
        outside_bytes=_frozen_bytes(set(model.parameters()) - inside),
        plan=plan,
    )


@contextmanager
def _as_if_in_rows(model: PreTrainedModel) -> Iterator[None]:
    """Let the base's own embedding be trained on longer rows, in the place of virtual tokens.

    Which tokens are virtual is told by the values of ids, which are not there.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Module)
    hook = embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())
    try:
        with route(model, None):
            yield
    finally:
        hook.remove()


def _without_data(config: MethodConfig) -> MethodConfig:
    """A method's settings with a start that needs no values, whose tensors have the same shapes."""
    if isinstance(config, LoRAConfig) and config.init in ("pissa", "eva"):
        return config.model_copy(update={"init": "kaiming"})
    return config


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model's stack, which `shard: base` gathers one at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]


def _frozen_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(each.nbytes for each in parameters if not each.requires_grad)


class _Step:
    """The step of a run: loss, gradients, clipping, AdamW."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: TrainConfig,
        weights: Sequence[nn.Parameter],
        *,
        task: str,
        device: DeviceKind,
    ) -> None:
        self.model, self.config, self.task = model, config, task
        self.trained = [each for each in weights if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, foreach=device == "cuda")
        self.last_good: list[Tensor] = []

    def prepare(self, counter: StepCounter) -> None:
        """Make what stays from step to step: moments, and the copy of the last good weights."""
        counter.kind = "optimizer"
        self.last_good = [torch.empty_like(each) for each in self.trained]
        for each in self.trained:
            each.grad = torch.zeros_like(each)
        self.optimizer.step()
        moments = [v for s in self.optimizer.state.values() for v in s.values()]
        counter.hold((each for each in moments if each.is_meta), "optimizer")
        self.optimizer.zero_grad()
        for each in self.trained:
            each.register_post_accumulate_grad_hook(
                lambda p: counter.hold([cast(Tensor, p.grad)], "gradients")
            )

    def run(self, counter: StepCounter, batch: Mapping[str, Any]) -> None:
        """Train one step."""
        for _ in range(self.config.accumulate):
            counter.kind = "activations"
            packed = batch.get(PACKED)
            with attention_within(self.model, packed):
                loss = self._loss(batch)
                counter.kind = "temporary"
                loss.backward()
        for each in self.trained:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
                counter.hold([each.grad], "gradients")
        nn.utils.clip_grad_norm_(self.trained, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        labels, config = batch["labels"], self.config
        inputs = self._inputs(batch)
        how = Loss(self.task, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
        if how.objective is not None:
            return how(how.objective.outputs(self.model, inputs), labels.to(META), len(labels))
        loss, _ = text_losses(
            self.model,
            inputs,
            labels,
            weights=item_weight(labels, None),
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
        )
        return loss

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the model is called with. Labels keep their values, which say what is computed."""
        inputs = {
            name: each.to(META)
            for name, each in batch.items()
            if name not in ("labels", PACKED, "attention_mask")
        }
        if "attention_mask" in batch and PACKED not in batch:
            rows, length = batch["attention_mask"].shape
            # The mask that transformers would make from the values of the short one.
            shape = (rows, 1, length, length)
            inputs["attention_mask"] = torch.empty(shape, dtype=torch.bool, device=META)
        return inputs
