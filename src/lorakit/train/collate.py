"""Batches as a model takes them, without padding and without logits that no label asks for."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit.kernels.packed_rows import Segments
from lorakit.tasks.batches import joined_batch, pad_token, training_batch
from lorakit.tasks.encode import Example
from lorakit.train.layout import PLAIN, Layout
from lorakit.train.loss import positions_to_keep

SEGMENTS = "segments"
"""Key of a batch's segments: not for the model itself, but for `attention_within`."""


class Collator:
    """Turns examples into one batch, padded or joined."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: nn.Module,
        *,
        task: str,
        layout: Layout = PLAIN,
    ) -> None:
        self._layout = layout
        self._pad_id = pad_token(tokenizer)
        accepted = inspect.signature(model.forward).parameters
        # The output head is most of a small model's work, and prompts need none of it.
        self._trims = task == "generation" and "logits_to_keep" in accepted

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the batch; `logits_to_keep` lists the last positions that are needed.

        The layout says whether it is one row, and whether its segments come with it.
        """
        batch = self._batch(examples)
        if self._trims:
            length = batch["labels"].shape[1]
            kept = positions_to_keep(batch["labels"])
            # As a tensor, because a slice of hidden states is not contiguous, and then torch copies
            # the whole output head once per row.
            batch["logits_to_keep"] = torch.arange(length - kept, length)
        return batch

    def _batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        lengths = tuple(len(example.input_ids) for example in examples)
        if self._layout.joined:
            segments = Segments((lengths,), sum(lengths))
            return {**joined_batch(examples), SEGMENTS: segments}
        batch: dict[str, Any] = training_batch(examples, pad_id=self._pad_id)
        if self._layout.segmented:
            batch[SEGMENTS] = Segments(tuple((n,) for n in lengths), max(lengths))
        return batch
