"""The collator: samples to one batch, padded or packed as the layout says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.data.batches import joined_batch, pad_token, training_batch
from lorakit.data.encode import Example
from lorakit.data.packing import PLAIN, BatchLayout
from lorakit.kernels.packed_sequences import Segments

SEGMENTS = "segments"
"""The batch's key for its packed sequences: for `attention_within`, not for the model."""


class Collator:
    """Makes one batch of samples, padded or packed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: BatchLayout = PLAIN) -> None:
        self._layout = layout
        self._pad_id = pad_token(tokenizer)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The batch with its labels, as `joined_batch` or `training_batch` gives it.

        Where the model computes attention within packed sequences, the key SEGMENTS has them.
        """
        lengths = tuple(len(example.input_ids) for example in examples)
        if self._layout.joined:
            joined = joined_batch(examples, pad_id=self._pad_id, multiple=self._layout.multiple)
            segments = Segments((lengths,), joined["input_ids"].shape[1])
            return {**joined, SEGMENTS: segments}
        batch: dict[str, Any] = training_batch(
            examples, pad_id=self._pad_id, multiple=self._layout.multiple
        )
        if self._layout.segmented:
            batch[SEGMENTS] = Segments(tuple((n,) for n in lengths), max(lengths))
        return batch
