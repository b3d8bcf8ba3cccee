"""The tokens that end an answer, which may differ between the rows of a mixed batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.adapter.card import TrainedUse
from lorakit.attachment.state import require_attachment
from lorakit.errors import ConfigError
from lorakit.routing.row_parts import names_of_rows


def end_tokens(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, trained: Iterable[int] = ()
) -> list[int]:
    """The tokens that end an answer, in ascending order.

    These are the tokenizer's end token, those of the base's generation config (a chat model's turns
    often end in another token), and those that ended the targets in training.
    """
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return sorted({end for end in (tokenizer.eos_token_id, *listed, *trained) if end is not None})


def ends_of_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: int, *, stop: str | None = None
) -> list[frozenset[int]]:
    """The tokens that end the answer of each row: also those that its adapters were trained on.

    Args:
        model: a model, with a route for rows or without.
        tokenizer: its tokenizer.
        rows: how many there are.
        stop: a text of one token that ends answers too.

    Raises:
        AdapterFileError: the card of an adapter has entries that training does not write.
        ConfigError: `stop` is not one token.
        RouteError: the route is for another number of rows.
    """
    more = () if stop is None else (_token_of(stop, tokenizer),)
    return [
        frozenset(end_tokens(model, tokenizer, trained=[*_trained_ends(model, names), *more]))
        for names in names_of_rows(model, rows)
    ]


def _trained_ends(model: nn.Module, names: Sequence[str]) -> list[int]:
    """The tokens that ended the targets of these adapters."""
    if not names:
        return []
    adapters = require_attachment(model).adapters
    cards = (adapters[name].record.card for name in names)
    return [end for card in cards for end in TrainedUse.on(card).end_tokens]


def _token_of(stop: str, tokenizer: PreTrainedTokenizerBase) -> int:
    ids = tokenizer.encode(stop, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"stop: {stop!r} is {len(ids)} tokens of this tokenizer, and must be one, which an"
            " answer ends with"
        )
    return int(ids[0])


class RowEnds:
    """A stopping criterion of transformers' `generate`: each row ends at tokens of its own."""

    def __init__(self, ends: Sequence[Collection[int]]) -> None:
        # generate pads the rows that are done if a criterion has this attribute.
        self.eos_token_id = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is done (rows)."""
        last = input_ids[:, -1].tolist()
        done = [token in ends for token, ends in zip(last, self.eos_token_id, strict=True)]
        return torch.tensor(done, device=input_ids.device)
