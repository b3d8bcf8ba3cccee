"""The layout of training batches: packed or padded, as the model allows.

Packing is used only if a probe shows that the model gives the same logits for packed sequences as
for padded ones.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.data.batches import joined_batch, training_batch
from lorakit.data.encode import Example
from lorakit.errors import ConfigError
from lorakit.kernels.packed_sequences import FEW_SIZES, Segments
from lorakit.models.attention import attention_within, takes_attention_functions

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The largest error of logits, relative to their root mean square, that counts as rounding.

Models without torch's fused attention compute softmax in float32 even in float64.
"""
TOLERANCE_IN_HALF_PRECISION = 0.1
"""SmolLM2 in bfloat16: 0.015 of rounding, and 0.3 where samples attend to each other."""

_LENGTHS = (5, 9, 1, 6)
"""The lengths, in tokens, of the probe's samples."""


@dataclass(frozen=True, kw_only=True)
class BatchLayout:
    """The form of a batch of samples."""

    joined: bool = False
    """The samples are packed into one row, padded at its end alone; else each has a padded row."""
    segmented: bool = False
    """Attention is computed for each sample by itself, by `attention_within`."""
    by_length: bool = False
    """Samples of similar length share a batch."""
    multiple: int = 1
    """The rows' length in tokens is a multiple of it."""
    reason: str = ""
    """Why samples are not packed."""

    def __str__(self) -> str:
        """The layout in words, with the reason why it is not packed."""
        if self.joined:
            return "rows joined without padding"
        order = "padded, rows of like length together" if self.by_length else "padded"
        return f"{order}, because {self.reason}" if self.reason else order


PLAIN = BatchLayout()
"""Padded samples in random order, and the model's own attention."""


def choose_layout(model: PreTrainedModel, *, task: str, packing: str) -> BatchLayout:
    """The best layout for which the model gives the same logits as for padded samples.

    A probe of a few samples, without gradients, decides; it changes neither weights nor random
    state.

    Args:
        model: the base, without adapters in use.
        task: generation, classification or regression.
        packing: auto, on or off.

    Raises:
        ConfigError: packing is on, and the model cannot do it.
    """
    if packing == "off":
        return PLAIN
    reason = _obstacle(model, task)
    if not reason:
        reason = _difference(model, joined=True)
    if not reason:
        return BatchLayout(joined=True, segmented=True, multiple=FEW_SIZES)
    if packing == "on":
        raise ConfigError(f"packing is on, but {reason}: leave it at auto, or turn it off")
    segmented = takes_attention_functions(model) and not _difference(model, joined=False)
    return BatchLayout(segmented=segmented, by_length=True, reason=reason)


def _obstacle(model: PreTrainedModel, task: str) -> str:
    """The reason why samples cannot be packed, if one is known without a probe; else ""."""
    family = model.config.model_type
    if task != "generation":
        return f"{task} reads one token of each row"
    if not takes_attention_functions(model):
        return f"{family} has attention of its own, which cannot keep rows apart"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{family} takes no position_ids, so positions cannot start anew"
    return ""


@torch.no_grad()
def _difference(model: PreTrainedModel, *, joined: bool) -> str:
    """The probe: how logits with packed sequences differ from the model's own; "" if they do not.

    Args:
        model: the base.
        joined: pack the samples into one row; else they are padded, and only attention is within
            each of them.
    """
    examples = _examples(model)
    padded = training_batch(examples, pad_id=0)
    width = padded["input_ids"].shape[1]
    segments = Segments(tuple((n,) for n in _LENGTHS), width)
    batch = padded
    if joined:
        batch, segments = joined_batch(examples), Segments((_LENGTHS,), sum(_LENGTHS))
    real = padded["attention_mask"].bool()
    training = model.training
    model.eval()
    try:
        expected = _logits(model, padded)
        with attention_within(model, segments):
            found = _logits(model, batch)
    # A model's code can raise any error; whatever it is, the model cannot do it.
    except Exception as error:
        return f"{model.config.model_type} fails with segments: {error}"
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
    """The probe's samples: the same random tokens each time, without 0, the padding."""
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    most = embeddings.num_embeddings
    rows = (torch.randint(1, most, (n,), generator=generator).tolist() for n in _LENGTHS)
    return [Example(input_ids=row, labels=row) for row in rows]
