"""Batches as a model takes them, without padding where it can do without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.batches import joined_batch, pad_token, preference_batch, training_batch
from lorakit.data.objectives.image_classification import image_batch
from lorakit.data.packing import PLAIN, Packing
from lorakit.data.samples import Example, flattened
from lorakit.kernels.packed_sequences import PackedSequences

PACKED = "packed_sequences"
"""Key of a batch's packed sequences: not for the model itself, but for `attention_within`."""


class Collator:
    """Turns examples into one batch, padded or joined."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, packing: Packing = PLAIN) -> None:
        """Pad with the tokenizer's token; without one, with token 0."""
        self._packing = packing
        self._tokenizer = tokenizer
        self._pad_id = 0 if tokenizer is None else pad_token(tokenizer)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch, labels included; the packing says in what form."""
        if examples[0].image is not None:
            assert self._tokenizer is not None, "an image processor says what images become"
            return image_batch(examples, self._tokenizer)
        if examples[0].rejected is not None:
            return preference_batch(examples, pad_id=self._pad_id, multiple=self._packing.multiple)
        lengths = tuple(len(text.input_ids) for text in flattened(examples))
        if self._packing.joined:
            joined = joined_batch(examples, pad_id=self._pad_id, multiple=self._packing.multiple)
            packed = PackedSequences((lengths,), joined["input_ids"].shape[1])
            return {**joined, PACKED: packed}
        batch: dict[str, Any] = training_batch(
            examples, pad_id=self._pad_id, multiple=self._packing.multiple
        )
        if self._packing.segmented:
            batch[PACKED] = PackedSequences(tuple((n,) for n in lengths), max(lengths))
        return batch
