"""What the machine can do at best: operations and bytes per second, and a step's products alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from lorakit.bench.roofline_counts import Batch, block_layers

SIDE = 2048
"""Rows and columns of the matrices whose product is the best that the machine can do."""
COPIED_BYTES = 256_000_000
"""Far more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best of some tries of each."""

    operations_per_s: float
    """Of a product of large matrices in the base's precision."""
    bytes_per_s: float
    """Of the sum of two large arrays; read and written bytes count."""
    alone_s: dict[str, float]
    """Part of a step: the time of its products with the base's weights, and of nothing else."""


@torch.inference_mode()
def ceilings(model: PreTrainedModel, batch: Batch, *, repeats: int) -> Ceilings:
    """Measure the machine with a model's own weights, at the shapes of a step."""
    device, dtype = model.device, model.dtype
    square = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
    array = torch.ones(COPIED_BYTES // 4, device=device)
    total = torch.empty_like(array)

    def best(work: Callable[[], object]) -> float:
        return min(_seconds(work, device) for _ in range(repeats + 1))

    return Ceilings(
        operations_per_s=2 * SIDE**3 / best(lambda: square @ square),
        bytes_per_s=3 * COPIED_BYTES / best(lambda: torch.add(array, array, out=total)),
        alone_s={part: best(work) for part, work in _products(model, batch).items()},
    )


def _products(model: PreTrainedModel, batch: Batch) -> dict[str, Callable[[], object]]:
    """The products with each weight of the blocks and the head, forward and backward."""
    blocks = [layer.weight for layer in block_layers(model)]
    output = model.get_output_embeddings()
    assert isinstance(output, nn.Module)
    head = [output.get_parameter("weight")]
    labelled = max(batch.labelled, 1)
    return {
        "blocks forward": lambda: _forward(blocks, batch.tokens),
        "blocks backward": lambda: _backward(blocks, batch.tokens),
        "head": lambda: [products(head, labelled) for products in (_forward, _backward)],
    }


def _forward(weights: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """Multiply an input of so many tokens with each weight, and return the last output."""
    inputs = {w.shape[1]: w.new_ones(tokens, w.shape[1]) for w in weights}
    for weight in weights:
        output = F.linear(inputs[weight.shape[1]], weight)
    return output


def _backward(weights: Sequence[torch.Tensor], tokens: int) -> torch.Tensor:
    """Multiply an output's gradient with each weight, and return that of the first input."""
    gradients = {w.shape[0]: w.new_ones(tokens, w.shape[0]) for w in weights}
    for weight in reversed(weights):
        gradient = gradients[weight.shape[0]] @ weight
    return gradient


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = read()
    work()
    return read() - begun
