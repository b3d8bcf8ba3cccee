"""One forward pass for a step of the answers and for parts of prompts.

Its batch is one row: a token of each answer, and then the next tokens of each prompt. All layers
compute these as one sequence, so weights are read once for all of them. Attention alone must know
what belongs together: answers read the keys and values of their slots, and each prompt its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from lorakit.errors import ModelError
from lorakit.serving.step_attention import Attention, whole


@dataclass(frozen=True)
class PromptPiece:
    """The next tokens of a prompt."""

    ids: Sequence[int]
    cache: DynamicCache
    """What was read of the prompt before, which the pass adds to."""


class JointPass(Cache):
    """Keys and values of a joint pass, and the attention that reads them.

    Args:
        answers: the slots' cache, of a step that has begun.
        mask: the columns that each answer sees, (answers, columns).
        pieces: of the prompts, in the order of their tokens.
        of_answers: how answers attend to the columns of their slots.
        of_pieces: how the tokens of a prompt attend to those before them.
    """

    def __init__(
        self,
        answers: Cache,
        mask: Tensor,
        pieces: Sequence[PromptPiece],
        of_answers: Attention = whole,
        of_pieces: Attention = whole,
    ) -> None:
        super().__init__(layers=answers.layers)
        self._answers, self._pieces = answers, pieces
        self._rows = len(mask)
        self._mask = mask[:, None, None].bool()
        self._of_answers, self._of_pieces = of_answers, of_pieces
        ends = list(accumulate((len(piece.ids) for piece in pieces), initial=self._rows))
        self._spans = list(pairwise(ends))
        self._masks = [_causal(piece, mask.device) for piece in pieces]
        self._given: Tensor | None = None
        self._of_parts: list[tuple[Tensor, Tensor]] = []

    @property
    def positions(self) -> list[int]:
        """Those of the pieces' tokens."""
        return [
            position
            for piece in self._pieces
            for position in range(
                piece.cache.get_seq_length(), piece.cache.get_seq_length() + len(piece.ids)
            )
        ]

    @property
    def wanted(self) -> list[int]:
        """The tokens whose logits are asked for: of the answers, and the last of each piece."""
        return [*range(self._rows), *(end - 1 for _, end in self._spans)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of a layer where they belong.

        Args:
            key_states: (1, heads, tokens, size of a head).
            value_states: the same.
            layer_idx: the layer's number.
            *args: what else the model says.
            **kwargs: what else the model says.

        Returns:
            What was given; `attend` knows what it stands for.
        """
        pair = key_states, value_states
        # A row of the slots has one token.
        keys, values = (x[:, :, : self._rows].transpose(0, 2) for x in pair)
        self._of_parts = [self._answers.update(keys, values, layer_idx)]
        for piece, (start, end) in zip(self._pieces, self._spans, strict=True):
            keys, values = (x[:, :, start:end] for x in pair)
            self._of_parts.append(piece.cache.update(keys, values, layer_idx))
        self._given = key_states
        return pair

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of a layer, for whose keys `update` was called last.

        Raises:
            ModelError: the layer does something else with its keys, or adds to its scores.
        """
        if key is not self._given or kwargs.get("position_bias") is not None:
            raise ModelError("its attention is not that of one row's keys and values alone")
        rows = query[:, :, : self._rows].transpose(0, 2)
        found, _ = self._of_answers(module, rows, *self._of_parts[0], self._mask, **kwargs)
        parts = [found.transpose(0, 1)]
        for (start, end), mask, own in zip(
            self._spans, self._masks, self._of_parts[1:], strict=True
        ):
            part, _ = self._of_pieces(module, query[:, :, start:end], *own, mask, **kwargs)
            parts.append(part)
        return torch.cat(parts, 1), None


def _causal(piece: PromptPiece, device: torch.device) -> Tensor | None:
    """What a piece's tokens see of those before and in it; None: all that comes before each."""
    past, count = piece.cache.get_seq_length(), len(piece.ids)
    if not past or count == 1:
        return None
    return torch.ones(1, 1, count, past + count, dtype=torch.bool, device=device).tril(past)
