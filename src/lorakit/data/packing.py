"""The packing of a training batch: rows joined without padding, where the model can do that."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.data.batches import joined_batch, training_batch
from lorakit.data.objectives import OBJECTIVES
from lorakit.data.samples import Example
from lorakit.errors import ConfigError
from lorakit.kernels.packed_sequences import FEW_SIZES, PackedSequences
from lorakit.models.attention import attention_within, takes_attention_functions

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The largest error of logits, relative to their root mean square, that counts as rounding.

Models without torch's fused attention compute softmax in float32 even of float64.
"""
TOLERANCE_IN_HALF_PRECISION = 0.1
"""SmolLM2 in bfloat16: 0.015 of rounding, and 0.3 where rows see each other."""

_LENGTHS = (5, 9, 1, 6)
"""The lengths of the rows of the probe."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The way in which rows become batches: packed, grouped by length, or padded as they come."""

    joined: bool = False
    """The rows of a batch are joined to one, which is padded at its end alone."""
    segmented: bool = False
    """Attention is computed within each row by itself, by `attention_within`."""
    by_length: bool = False
    """Rows of similar length share a batch."""
    multiple: int = 1
    """The length of padded or joined rows is a multiple of this."""
    reason: str = ""
    """Why rows are not joined."""

    def __str__(self) -> str:
        """The packing in words, and the reason why rows are not joined."""
        if self.joined:
            return "rows joined, without padding between them"
        order = "padded, rows of like length together" if self.by_length else "padded"
        return f"{order}, because {self.reason}" if self.reason else order


PLAIN = Packing()
"""Padded rows in random order, and the model's own attention."""


def choose_packing(model: PreTrainedModel, *, task: str, packing: str) -> Packing:
    """The best packing with which the model computes the same logits as from padded rows.

    A probe tells: a few rows, without gradients; weights and random state stay as they are.

    Args:
        model: the base, without adapters in use.
        task: what the model does.
        packing: the setting of that name.

    Raises:
        ConfigError: packing is on, and the model cannot do it.
    """
    if packing == "off" or task == "image-classification":
        return PLAIN
    reason = _obstacle(model, task)
    if not reason:
        reason = _difference(model, joined=True)
    if not reason:
        return Packing(joined=True, segmented=True, multiple=FEW_SIZES)
    if packing == "on":
        raise ConfigError(f"packing is on, but {reason}: leave it at auto, or turn it off")
    if model.config.is_encoder_decoder:
        return Packing(by_length=True, reason=reason)
    segmented = takes_attention_functions(model) and not _difference(model, joined=False)
    return Packing(segmented=segmented, by_length=True, reason=reason)


def _obstacle(model: PreTrainedModel, task: str) -> str:
    """The reason why rows cannot be joined, as far as that is known without a probe; else ""."""
    family = model.config.model_type
    if task in OBJECTIVES:
        return f"{task} {OBJECTIVES[task].unjoined}"
    if model.config.is_encoder_decoder:
        return f"{family} has an encoder and a decoder, whose rows are two sequences each"
    if not takes_attention_functions(model):
        return f"{family} has attention of its own, which cannot keep rows apart"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{family} takes no position_ids, so positions cannot start anew"
    return ""


@torch.no_grad()
def _difference(model: PreTrainedModel, *, joined: bool) -> str:
    """The difference that packed sequences, joined or padded, make to the logits; or "".

    Without weights there are no logits; then none is expected.
    """
    if model.device.type == "meta":
        return ""
    examples = _examples(model)
    padded = training_batch(examples, pad_id=0)
    width = padded["input_ids"].shape[1]
    packed = PackedSequences(tuple((n,) for n in _LENGTHS), width)
    batch = padded
    if joined:
        batch, packed = joined_batch(examples), PackedSequences((_LENGTHS,), sum(_LENGTHS))
    real = padded["attention_mask"].bool()
    training = model.training
    model.eval()
    try:
        expected = _logits(model, padded)
        with attention_within(model, packed):
            found = _logits(model, batch)
    # Unknown models may raise anything; then they cannot keep packed sequences apart.
    except Exception as error:
        return f"{model.config.model_type} fails with packed sequences: {error}"
    finally:
        model.train(training)
    if found.dim() == 3:
        found, expected = (found[0] if joined else found[real]), expected[real]
    distance = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    if distance <= TOLERANCE.get(model.dtype, TOLERANCE_IN_HALF_PRECISION):
        return ""
    return f"the logits of {model.config.model_type} are then others ({distance:.1e} of their size)"


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: each.to(model.device) for name, each in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits.double()


def _examples(model: PreTrainedModel) -> list[Example]:
    """Rows of tokens, always the same ones; none is 0, with which they are padded."""
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    most = embeddings.num_embeddings
    rows = (torch.randint(1, most, (n,), generator=generator).tolist() for n in _LENGTHS)
    return [Example(input_ids=row, labels=row) for row in rows]
