"""Batches as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.tasks.batches import pad_token, training_batch
from lorakit.tasks.encode import Example


class Collator:
    """Turns examples into one padded batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad_id = pad_token(tokenizer)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the batch, labels included."""
        return training_batch(examples, pad_id=self._pad_id)
