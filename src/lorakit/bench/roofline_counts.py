"""What one training step must do at the least: operations and bytes, part by part.

A multiplication and an addition count as two operations. Counted is the work for the tokens of the
rows: what is done for padding is no part of it, and makes the distance from the limit larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lorakit.attachment.attach import adapter_parameters
from lorakit.data.chat import IGNORED
from lorakit.data.encode import Example
from lorakit.errors import ModelError
from lorakit.models.base import base_modules

PARTS = (
    "blocks forward",
    "blocks backward",
    "attention",
    "head",
    "adapters",
    "elementwise",
    "optimizer",
)
"""The parts of a step that have a limit of their own."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations and bytes of a part; the bytes are those that must go to memory and back."""

    operations: int
    bytes: int

    def seconds(self, *, operations_per_s: float, bytes_per_s: float) -> float:
        """The least time on a machine that does both at once."""
        return max(self.operations / operations_per_s, self.bytes / bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What counts of the rows of a step."""

    tokens: int
    labelled: int
    """Tokens that are learnt."""
    pairs: int
    """Pairs of a token and one that it sees: itself, or one before it in its row."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Return what counts of some rows."""
        lengths = [len(example.input_ids) for example in examples]
        labels = [label for example in examples for label in _labels(example)[1:]]
        return cls(
            tokens=sum(lengths),
            labelled=sum(label != IGNORED for label in labels),
            pairs=sum(length * (length + 1) // 2 for length in lengths),
        )


def _labels(example: Example) -> list[int]:
    assert isinstance(example.labels, list), "rows to generate have a label for each token"
    return example.labels


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder with an adapter, as the counts need them."""

    weights: tuple[tuple[int, int], ...]
    """(d_out, d_in) of each linear layer of the blocks."""
    without_input_gradient: int
    """Values of those of them whose input nothing below learns from: q, k, v of the first block."""
    layers: int
    width: int
    inner: int
    """Width of the MLP."""
    queries: int
    """Width of all queries, which is that of the attention's output."""
    keys: int
    vocabulary: int
    adapter: int
    """Values of all A and B."""
    item: int
    """Bytes of a value of the base."""

    @classmethod
    def of(cls, model: PreTrainedModel, adapter_name: str) -> Shape:
        """The sizes of a model.

        Raises:
            ModelError: it is not built as Llama is.
        """
        config: Any = model.config
        layers = block_layers(model)
        head_width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        queries = config.num_attention_heads * head_width
        keys = config.num_key_value_heads * head_width
        return cls(
            weights=tuple((layer.out_features, layer.in_features) for layer in layers),
            without_input_gradient=config.hidden_size * (queries + 2 * keys),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner=config.intermediate_size,
            queries=queries,
            keys=keys,
            vocabulary=config.vocab_size,
            adapter=sum(p.numel() for _, p in adapter_parameters(model, adapter_name)),
            item=model.dtype.itemsize,
        )


def block_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The linear layers of the blocks, those with an adapter among them.

    Raises:
        ModelError: the model is not built as Llama is: q, k, v, o, gate, up, down in each block.
    """
    head = model.get_output_embeddings()
    found = [
        module
        for _, module in base_modules(model)
        if isinstance(module, nn.Linear) and module is not head
    ]
    needed = ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
    blocks = getattr(model.config, "num_hidden_layers", 0)
    if len(found) != 7 * blocks or not all(hasattr(model.config, name) for name in needed):
        raise ModelError(
            f"the roofline counts decoders with 7 linear layers in each block, as Llama has; this "
            f"{model.config.model_type} has {len(found)} in {blocks} blocks"
        )
    return found


def count(shape: Shape, batch: Batch) -> dict[str, Work]:
    """The work of one step, by part."""
    linear = sum(out * inner for out, inner in shape.weights)
    through = sum(out + inner for out, inner in shape.weights)
    learnt = linear - shape.without_input_gradient
    head = shape.width * shape.vocabulary
    logits = batch.labelled * shape.vocabulary
    return {
        "blocks forward": Work(
            operations=2 * batch.tokens * linear,
            bytes=shape.item * (linear + batch.tokens * through),
        ),
        # The gradient of the input alone: the weights are frozen.
        "blocks backward": Work(
            operations=2 * batch.tokens * learnt,
            bytes=shape.item * (learnt + batch.tokens * through),
        ),
        "attention": _attention(shape, batch),
        "head": Work(
            operations=2 * 2 * batch.labelled * head,
            # Forward and backward read the weight; logits are written, read, and their gradient
            # written and read.
            bytes=shape.item * (2 * head + 4 * logits),
        ),
        # Forward 2, gradients of A and B 2, gradient of the input 2 for each value and token.
        "adapters": Work(
            operations=6 * batch.tokens * shape.adapter,
            bytes=4 * 3 * shape.adapter,
        ),
        "elementwise": Work(operations=0, bytes=_elementwise_bytes(shape, batch)),
        # AdamW reads weight, gradient and two moments, and writes all but the gradient; float32.
        "optimizer": Work(operations=12 * shape.adapter, bytes=4 * 7 * shape.adapter),
    }


def _attention(shape: Shape, batch: Batch) -> Work:
    """Count the products of queries with keys and of weights with values, and the four backward."""
    product = 2 * batch.pairs * shape.queries
    ends = batch.tokens * (2 * shape.queries + 2 * shape.keys)
    return Work(
        operations=shape.layers * 6 * product,
        # Forward: q, k, v read and the output written; backward: these and their gradients.
        bytes=shape.layers * shape.item * 3 * ends,
    )


def _elementwise_bytes(shape: Shape, batch: Batch) -> int:
    """Count norms, residual sums, rotations and the MLP's product, each once through memory.

    Per block, forward: two norms (2 widths each), two sums (3 each), the rotation of q and k (read
    and written), SiLU(gate)·up (3 inner widths). Backward: norms 3, sums 3, the same, 5.
    """
    rotated = 2 * (shape.queries + shape.keys)
    forward = 10 * shape.width + rotated + 3 * shape.inner
    backward = 12 * shape.width + rotated + 5 * shape.inner
    return shape.item * batch.tokens * shape.layers * (forward + backward)
