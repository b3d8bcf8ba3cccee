"""What surrounds each call of a model with virtual tokens: they are put in, and taken out.

Three hooks without state of their own: before the model, after it, and before its input embedding,
which must not see ids beyond its rows. The call's frame is on top in its thread in the meantime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError
from lorakit.layers.route import Route
from lorakit.layers.token_positions import TokenPositions
from lorakit.methods.prompt.call import (
    COMPILED,
    GivenCall,
    PromptCall,
    begin,
    check_context,
    end,
    positions_of,
)
from lorakit.methods.prompt.encoder import keep_mask, prepare_stacks, put_in_encoder
from lorakit.methods.prompt.insert import LongerRows, rows_of
from lorakit.methods.prompt.kv_cache import begun, go_on, is_begun, record_of
from lorakit.models.shape import is_encoder_decoder
from lorakit.upstream.private_names import in_compiled_call

HOOKS = ("virtual tokens in", "virtual tokens out", "ids of virtual tokens")
"""What the hooks are called in an attachment."""
OF_ENCODER = ("virtual tokens into the encoder", "mask of the encoder")
"""What those of an encoder are called, beside them."""

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")
"""Arguments with a value for each token that rows get longer in."""


def watch(model: nn.Module, path: str) -> dict[str, RemovableHandle]:
    """Put the hooks on a model with an adapted input embedding at a path; return their handles."""
    handles = (
        model.register_forward_pre_hook(put_in, with_kwargs=True),
        model.register_forward_hook(take_out, always_call=True),
        model.get_submodule(path).register_forward_pre_hook(hide_ids),
    )
    found = dict(zip(HOOKS, handles, strict=True))
    if is_encoder_decoder(model):
        encoder = cast(Any, model).get_encoder()
        of_encoder = (
            encoder.register_forward_pre_hook(put_in_encoder, with_kwargs=True),
            encoder.register_forward_hook(keep_mask, always_call=True),
        )
        found |= zip(OF_ENCODER, of_encoder, strict=True)
    return found


def hide_ids(embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give the base's embedding its first token for each virtual one: a forward pre-hook.

    Raises:
        RouteError: a part of the model is compiled.
    """
    route: Route | None = getattr(embedding, "adapter_route", None)
    if route is None or not route.own.stack or route.own.stack[-1].tokens is None:
        return None
    if in_compiled_call():
        raise RouteError(COMPILED)
    frame = route.own.stack.pop()
    virtual = args[0] >= cast(nn.Embedding, embedding).num_embeddings
    tokens = replace(cast(TokenPositions, frame.tokens), embedded=bool(virtual.any()))
    route.own.stack.append(replace(frame, tokens=tokens))
    return (args[0].masked_fill(virtual, 0), *args[1:])


def put_in(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put virtual tokens into the rows that have none and need some: a forward pre-hook.

    Raises:
        RouteError: they cannot be put in, or a row has others than its adapter's.
    """
    return begin(model, args, kwargs, prepare_stacks if is_encoder_decoder(model) else _prepared)


def take_out(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output for the tokens that the caller knows of: a forward hook.

    Raises:
        RouteError: it is a tuple, whose parts have no names.
    """
    call = end(model)
    if call is None or output is None:
        return None
    if call.record is not None:
        call.record.keep_with(output)
    if call.answers is None:
        return None
    if isinstance(output, tuple | Tensor):
        raise RouteError("a model that gets virtual tokens must answer with return_dict=True")
    for name in call.states:
        if name in output and output[name] is not None:
            output[name] = _for_tokens(output[name], call, is_logits=name == "logits")
    return output


def _for_tokens(found: Any, call: PromptCall, *, is_logits: bool) -> Any:
    if isinstance(found, tuple):
        return tuple(_for_tokens(each, call, is_logits=is_logits) for each in found)
    if is_logits and found.dim() != 3:
        return found
    assert call.answers is not None
    answers = call.answers
    if is_logits:
        # The model was asked for the last logits of each row alone.
        answers = answers[:, -call.logits_to_keep :] - (call.longer - found.shape[1])
    index = answers.reshape(*answers.shape, *[1] * (found.dim() - 2))
    return found.gather(1, index.expand(*answers.shape, *found.shape[2:]))


def _prepared(batch: GivenCall, call: PromptCall) -> dict[str, Any] | None:
    """Note what a call is about, and return its arguments, if they must be others."""
    named, ids, cache = batch.named, batch.ids, batch.named.get("past_key_values")
    if ids is None:
        return None
    tokens = batch.tokens(len(ids))
    call.tokens = positions_of(ids - batch.vocabulary, tokens)
    if is_begun(cache):
        call.record = record_of(cache)
        if call.record is not None:
            takes = batch.takes("position_ids")
            return go_on(named, call.record, takes_positions=takes)
        if any(tokens):
            raise RouteError(
                "the cache was filled without the virtual tokens of the adapter in use: begin "
                "anew, with an empty one"
            )
        return None
    if not any(tokens):
        return None
    has = [False] * len(ids) if call.tokens is None else call.tokens.rows_with_tokens()
    lacking = [None if own else each for own, each in zip(has, tokens, strict=True)]
    return _longer(batch, call, lacking)


def _longer(
    batch: GivenCall, call: PromptCall, tokens: Sequence[VirtualTokens | None]
) -> dict[str, Any] | None:
    """The arguments for rows with their virtual tokens; the positions are noted."""
    named, ids = batch.named, cast(Tensor, batch.ids)
    mask, labels = named.get("attention_mask"), _labels_by_token(named, ids)
    cache = named.get("past_key_values")
    if any(tokens):
        _check(named, ids, tokens, labels)
    rows = rows_of(ids, mask if isinstance(mask, Tensor) else None, labels, tokens)
    # What generate writes is appended at the end of each row.
    left = cache is not None or any(row.start for row in rows)
    longer = LongerRows(rows, left=left, device=ids.device)
    call.record = begun(longer, longer.mask(mask) if any(tokens) else mask)
    if not longer.is_longer:
        return None
    check_context(batch.model, longer)
    call.answers, call.longer = longer.answers, longer.longer
    changed: dict[str, Any] = {
        "input_ids": longer.ids(ids, padding=batch.padding),
        "attention_mask": call.record.mask,
    }
    call.tokens = TokenPositions(changed["input_ids"] - batch.vocabulary)
    if labels is not None:
        changed["labels"] = longer.labels(labels)
    if named.get("token_type_ids") is not None:
        changed["token_type_ids"] = longer.types(named["token_type_ids"])
    given = named.get("position_ids")
    if given is not None or batch.takes("position_ids"):
        changed["position_ids"] = longer.positions(given)
    call.logits_to_keep = named.get("logits_to_keep") or 0
    if call.logits_to_keep:
        first = int(longer.answers[:, -call.logits_to_keep :].min())
        changed["logits_to_keep"] = longer.longer - first
    return named | {name: each for name, each in changed.items() if each is not None}


def _labels_by_token(named: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    labels = named.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != ids.shape:
        return None
    return labels


def _check(
    named: Mapping[str, Any],
    ids: Tensor,
    tokens: Sequence[VirtualTokens | None],
    labels: Tensor | None,
) -> None:
    """Refuse what virtual tokens cannot be put into without a silent error.

    Raises:
        RouteError: with every problem.
    """
    problems = []
    mask, cache = named.get("attention_mask"), named.get("past_key_values")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        problems.append("the attention mask is not one of a value for each token")
    if getattr(cache, "is_compileable", False):
        problems.append(f"a {type(cache).__name__} has a fixed length: use a dynamic cache")
    kept = named.get("logits_to_keep")
    if isinstance(kept, Tensor):
        problems.append("logits_to_keep names places, and not a number of tokens")
    # generate alone asks for the last logits of a row in a call without cache.
    generates = named.get("use_cache") is False and bool(named.get("logits_to_keep"))
    if generates and labels is None and any(t and t.infix for t in tokens):
        problems.append(
            "generate without a cache gives the model prompt and answer as one row, between which "
            "the infix has its place: leave use_cache at True"
        )
    problems += [
        f"{name} has a value for each token, and what trained ones have there is not known"
        for name, each in named.items()
        if name not in BY_TOKEN and isinstance(each, Tensor) and ids.shape[1] in each.shape[1:]
    ]
    if problems:
        raise RouteError.listing("virtual tokens cannot be put into these rows", problems)
