"""Virtual tokens in what the encoder of an encoder-decoder reads.

In a call of the model they are put in before the encoder reads the rows, and the decoder, which
attends to all of them, gets the mask of the longer rows. transformers' `generate` calls the encoder
by itself, and then the model with what it returned: the mask is kept on that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import RouteError
from lorakit.layers.token_positions import TokenPositions
from lorakit.methods.prompt.call import (
    GivenCall,
    PromptCall,
    begin,
    call_under_way,
    check_context,
    end,
    positions_of,
)
from lorakit.methods.prompt.insert import LongerRows, rows_of

NAME = "_lorakit_mask"
"""The attribute of an encoder's output that holds the mask of its rows."""

STATES = ("encoder_last_hidden_state", "encoder_hidden_states")
"""Outputs of an encoder-decoder with a value for each token of a row."""

OF_DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
"""Arguments of which the decoder has something to read."""


def put_in_encoder(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put virtual tokens into rows that an encoder reads by itself: a forward pre-hook.

    Raises:
        RouteError: they cannot be put in, or a row has others than its adapter's.
    """
    if call_under_way(encoder) is not None:
        return None
    return begin(encoder, args, kwargs, _longer)


def keep_mask(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Keep the mask of longer rows with what an encoder returns by itself: a forward hook.

    Raises:
        RouteError: it returns a tuple, which cannot hold it.
    """
    call = end(encoder)
    if call is None or output is None or call.mask is None:
        return
    if isinstance(output, tuple | Tensor):
        raise RouteError("an encoder that gets virtual tokens must answer with return_dict=True")
    setattr(output, NAME, call.mask)


def prepare_stacks(batch: GivenCall, call: PromptCall) -> dict[str, Any] | None:
    """Note what a call of an encoder-decoder is about, and return its arguments, if others.

    Raises:
        RouteError: virtual tokens cannot be put in, or the encoder read rows without them.
    """
    call.states = STATES
    read = batch.named.get("encoder_outputs")
    if read is not None:
        return _after_encoder(batch, read)
    changed = _longer(batch, call)
    if call.tokens is not None and all(batch.named.get(name) is None for name in OF_DECODER):
        raise RouteError(
            "the decoder would read the encoder's rows, whose virtual tokens are none of its own:"
            " give decoder_input_ids or labels"
        )
    return changed


def _after_encoder(batch: GivenCall, read: Any) -> dict[str, Any] | None:
    """The arguments of a call whose rows were read, with the mask of all that was read."""
    states, mask = read[0], getattr(read, NAME, None)
    if mask is None:
        if any(batch.tokens(len(states))):
            raise RouteError(
                "encoder_outputs were made without the virtual tokens of the adapter in use: have"
                " the model's encoder make them while it is in use"
            )
        return None
    # Of several answers to one row, each has the row's states.
    mask = mask.repeat_interleave(len(states) // len(mask), 0)
    return batch.named | {"attention_mask": mask}


def _longer(batch: GivenCall, call: PromptCall) -> dict[str, Any] | None:
    """Note where virtual tokens are in rows for an encoder; the arguments, if some lack them."""
    named, ids = batch.named, batch.ids
    if ids is None:
        return None
    tokens = batch.tokens(len(ids))
    call.tokens = positions_of(ids - batch.vocabulary, tokens)
    if not any(tokens):
        return None
    has = [False] * len(ids) if call.tokens is None else call.tokens.rows_with_tokens()
    lacking = [None if own else each for own, each in zip(has, tokens, strict=True)]
    mask = named.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise RouteError(
            "virtual tokens cannot be put into these rows: the attention mask is not one of a value"
            " for each token"
        )
    rows = rows_of(ids, mask, None, lacking)
    longer = LongerRows(rows, left=any(row.start for row in rows), device=ids.device)
    call.mask = longer.mask(mask)
    if not longer.is_longer:
        return None
    check_context(batch.model, longer)
    call.answers, call.longer = longer.answers, longer.longer
    ids = longer.ids(ids, padding=batch.padding)
    call.tokens = TokenPositions(ids - batch.vocabulary)
    return named | {"input_ids": ids, "attention_mask": call.mask}
