"""What GPT-3 takes to train by the paper's own accounting: bytes held, and FLOPs computed.

Section 4.2 has 1.2 TB for full fine-tuning and 350 GB for LoRA, a checkpoint of 35 MB, and training
that is 25 % faster. Everything is in float16, with Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from transformers import GPT2Config

from lorakit.config.train import TrainConfig
from lorakit.data.samples import Example
from lorakit.estimating.training_step import count_step
from lorakit.models.without_weights import build_without_weights

VALUE_BYTES = 2
"""Of a value in float16."""
MOMENTS = 2
"""Values that Adam keeps of each trained one."""
FEW_BLOCKS, FEW_TOKENS, FEW_WORDS = 2, 64, 64
"""Blocks, tokens and vocabulary of the step whose FLOPs are counted: ratios are those of all."""
WIDTH, HEADS = 12_288, 96


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """What a training run holds, activations left out."""

    weights: int
    gradients: int
    moments: int

    @property
    def without_gradients(self) -> int:
        """The sum where each gradient is used up as soon as it is there."""
        return self.weights + self.moments

    @property
    def together(self) -> int:
        """The sum where all gradients are there at once."""
        return self.without_gradients + self.gradients


def held_bytes(*, parameters: int, trained: int, beside: bool) -> HeldBytes:
    """What training holds in float16.

    Args:
        parameters: of the model.
        trained: values that are trained.
        beside: whether these are held beside the model's, as an adapter is.
    """
    return HeldBytes(
        weights=VALUE_BYTES * (parameters + (trained if beside else 0)),
        gradients=VALUE_BYTES * trained,
        moments=MOMENTS * VALUE_BYTES * trained,
    )


@cache
def step_flops(method: Literal["full", "lora"], memory: Literal["fast", "low"]) -> int:
    """The FLOPs of a step of a model as wide as GPT-3, with few blocks.

    Args:
        method: full fine-tuning, or LoRA of rank 4 on W_q and W_v.
        memory: low computes blocks again, as whoever trains 175 billion parameters does.
    """
    settings: dict[str, Any] = {"lora": {"rank": 4, "targets": ("q", "v")}, "memory": memory}
    config = TrainConfig(
        model="gpt3", out="out", method=(method,), dtype="float16", batch_size=1, **settings
    )
    shape = GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_layer=FEW_BLOCKS, vocab_size=FEW_WORDS, n_positions=FEW_TOKENS
    )
    model = build_without_weights(shape, dtype="float16")
    row = Example(input_ids=[1] * FEW_TOKENS, labels=[1] * FEW_TOKENS)
    return count_step(model, config, [row], task="generation", device="cuda").flops
