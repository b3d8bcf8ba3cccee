"""What GPT-3 takes to train by the paper's own accounting, out of `lk.estimate`.

Section 4.2 has 1.2 TB for full fine-tuning and 350 GB for LoRA, a checkpoint of 35 MB, and training
that is 25 % faster. Everything is in float16, with Adam.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from lorakit.config.estimate import EstimateConfig
from lorakit.estimating.estimate import Estimate, estimate
from lorakit.models.without_weights import build_without_weights
from lorakit.paper.shapes import GPT3, SHAPES

VALUE_BYTES = 2
"""Of a value in float16."""
Trained = Literal["full", "lora"]
"""Full fine-tuning, or LoRA of rank 4 on W_q and W_v."""


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What a training run of GPT-3 holds and computes. Sizes in bytes."""

    trained: int
    """Values that are trained."""
    weights: int
    """The model as it is trained, with what is trained beside it."""
    gradients: int
    """All of them; the peak of LoRA's step is before they are there."""
    moments: int
    """Adam's."""
    checkpoint: int
    """The folder of what was trained."""
    flops: int
    """Of a step."""

    @property
    def without_gradients(self) -> int:
        """What is held where each gradient is used up as soon as it is there."""
        return self.weights + self.moments

    @property
    def together(self) -> int:
        """What is held where all gradients are there at once."""
        return self.without_gradients + self.gradients


@cache
def gpt3_estimate(method: Trained) -> Estimate:
    """The estimate of a step of GPT-3 175B: one row of its 2,048 tokens.

    Blocks compute their activations again, as whoever trains 175 billion parameters has them do.
    """
    how: Any = {
        "lora": {"rank": 4, "targets": ("q", "v"), "dtype": "float16"},
        "full": {"dtype": "float16"},
    }
    shape = SHAPES[GPT3]()
    config = EstimateConfig(
        model=GPT3,
        method=(method,),
        dtype="float16",
        batch_size=1,
        row_tokens=shape.max_position_embeddings,
        memory="low",
        device="cuda",
        calibrate=False,
        **how,
    )
    return estimate(config, model=build_without_weights(shape, dtype="float16", name=GPT3))


def accounting(method: Trained) -> Accounting:
    """The parts of an estimate that the paper counts.

    Left out are activations, the base beside a copy of it that is trained in full, and the copy of
    the weights that last gave a finite loss.
    """
    found = gpt3_estimate(method)
    held, last_good = found.training, VALUE_BYTES * found.trained
    base = held["weights"] if method == "lora" else 0
    return Accounting(
        trained=found.trained,
        weights=base + held["adapter"],
        gradients=VALUE_BYTES * found.trained,
        moments=held["optimizer"] - last_good,
        checkpoint=found.adapter_bytes,
        flops=found.flops,
    )
