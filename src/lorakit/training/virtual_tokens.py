"""Rows for one adapter: cut so that its virtual tokens fit, and with these inserted."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from lorakit.attachment.state import virtual_tokens
from lorakit.config.train import DataConfig
from lorakit.data.encode import encode_rows
from lorakit.data.row_types import Rows
from lorakit.data.samples import Encoded
from lorakit.errors import ConfigError
from lorakit.models.shape import context_length, decoder_start


def longest_row(model: nn.Module, name: str | None) -> int | None:
    """The most tokens of a row beside an adapter's virtual tokens; None: the model has no limit."""
    tokens, context = virtual_tokens(model, name), context_length(model)
    return None if context is None else context - len(tokens or ())


def check_infix(model: nn.Module, name: str, kind: str) -> None:
    """Make sure that rows have a prompt, where an adapter has virtual tokens after it.

    Raises:
        ConfigError: rows are texts, which have none.
    """
    tokens = virtual_tokens(model, name)
    if kind == "text" and tokens is not None and tokens.infix:
        raise ConfigError(
            "rows are texts without a prompt, after which infix tokens would be: "
            "set prefix.infix to 0"
        )


def with_tokens(encoded: Encoded, model: nn.Module, name: str | None) -> Encoded:
    """Rows with the virtual tokens of an adapter; the same rows, if it has none."""
    tokens = virtual_tokens(model, name)
    return encoded if tokens is None else tokens.into_all(encoded)


def encode_for(
    model: nn.Module,
    name: str | None,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
) -> Encoded:
    """Rows encoded for an adapter of a model, with its virtual tokens.

    Raises:
        DataError: no row is left, or rows or tokenizer do not allow it.
    """
    encoded = encode_rows(
        rows,
        tokenizer,
        data,
        longest=longest_row(model, name),
        decoder_start=decoder_start(model),
    )
    return with_tokens(encoded, model, name)
