"""What surrounds each call of a model with virtual tokens: they are put in, and taken out.

Three hooks without state of their own: before the model, after it, and before its input embedding,
which must not see ids beyond its rows. The call's frame is on top in its thread in the meantime.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation
from lorakit.layers.route import Frame, Route
from lorakit.layers.token_positions import TokenPositions
from lorakit.methods.prompt.insert import LongerRows, rows_of
from lorakit.methods.prompt.kv_cache import CacheRecord, begun, go_on, is_filled, record_of
from lorakit.models.shape import context_length
from lorakit.upstream.private_names import in_compiled_call

HOOKS = ("virtual tokens in", "virtual tokens out", "ids of virtual tokens")
"""What the hooks are called in an attachment."""

COMPILED = (
    "the adapter in use has virtual tokens, which can't be put into the rows of a compiled model: "
    "use the model as it was before torch.compile"
)

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")
"""Arguments with a value for each token that rows get longer in."""

STATES = ("last_hidden_state", "hidden_states", "start_logits", "end_logits")
"""Outputs with a value for each token, beside logits."""


@dataclass(kw_only=True)
class PromptCall:
    """A call of a model with virtual tokens: how its rows differ from the caller's."""

    tokens: TokenPositions | None = None
    """Where their virtual tokens are; None: they have none."""
    answers: Tensor | None = None
    """(rows, tokens): the position of each of the caller's tokens; None: nothing was put in."""
    longer: int = 0
    """Tokens of a row with those that were put in."""
    logits_to_keep: int = 0
    """The number of a row's last logits that the caller asked for; 0: all."""
    record: CacheRecord | None = None
    """The record to keep with the cache that the model returns."""


@dataclass(frozen=True, eq=False)
class CallFrame(Frame):
    """The frame of a call, with what `take_out` needs to know of it."""

    call: PromptCall = field(default_factory=PromptCall)


def watch(model: nn.Module, path: str) -> dict[str, RemovableHandle]:
    """Put the hooks on a model with an adapted input embedding at a path; return their handles."""
    handles = (
        model.register_forward_pre_hook(put_in, with_kwargs=True),
        model.register_forward_hook(take_out, always_call=True),
        model.get_submodule(path).register_forward_pre_hook(hide_ids),
    )
    return dict(zip(HOOKS, handles, strict=True))


def hide_ids(embedding: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Give the base's embedding its first token for each virtual one: a forward pre-hook.

    Raises:
        RouteError: a part of the model is compiled.
    """
    route: Route | None = getattr(embedding, "adapter_route", None)
    if route is None or not route.own.stack or route.own.stack[-1].tokens is None:
        return None
    if _is_compiled():
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
    embedding = cast(Any, model).get_input_embeddings()
    route: Route | None = getattr(embedding, "adapter_route", None)
    if route is None:
        return None
    batch = _ModelCall(model, embedding, _named(model, args, kwargs), route)
    if _is_compiled():
        if any(batch.tokens(batch.rows)):
            raise RouteError(COMPILED)
        return None
    call = PromptCall()
    changed = _prepared(batch, call)
    frame = vars(route.of_call(call.tokens)) | {"call": call}
    route.own.stack.append(CallFrame(**frame))
    return None if changed is None else ((), changed)


def take_out(model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output for the tokens that the caller knows of: a forward hook.

    Raises:
        RouteError: it is a tuple, whose parts have no names.
    """
    embedding = cast(Any, model).get_input_embeddings()
    route: Route | None = getattr(embedding, "adapter_route", None)
    frame = None if route is None or not route.own.stack else route.own.stack[-1]
    if route is None or not isinstance(frame, CallFrame):
        return None
    route.own.stack.pop()
    call = frame.call
    if output is None:
        return None
    if call.record is not None:
        call.record.keep_with(output)
    if call.answers is None:
        return None
    if isinstance(output, tuple | Tensor):
        raise RouteError("a model that gets virtual tokens must answer with return_dict=True")
    for name in ("logits", *STATES):
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


def _is_compiled() -> bool:
    """Whether this runs within torch.compile, traced or between two graphs."""
    # Compiled code would keep what it read of one call for all later calls.
    return in_compiled_call()


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


@dataclass(frozen=True)
class _ModelCall:
    """One call: the model, and what it is called with."""

    model: nn.Module
    embedding: AdaptedLayer
    named: dict[str, Any]
    route: Route

    @property
    def ids(self) -> Tensor | None:
        return self.named.get("input_ids")

    @property
    def vocabulary(self) -> int:
        return cast(Any, self.embedding).num_embeddings

    @property
    def rows(self) -> int:
        """The rows of the first tensor."""
        named = (self.ids, *self.named.values())
        return len(next((each for each in named if isinstance(each, Tensor)), ()))

    def tokens(self, rows: int) -> list[VirtualTokens | None]:
        """The virtual tokens of each row's adapter."""
        operations = self.route.top.operations or {}
        operation: Operation | None = operations.get(self.embedding.adapter_number)
        return [None] * rows if operation is None else operation.tokens_of_rows(rows)

    def takes(self, name: str) -> bool:
        """Whether the model has an argument of this name."""
        return name in inspect.signature(self.model.forward).parameters

    @property
    def padding(self) -> int:
        """A token to pad with."""
        token = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return token if isinstance(token, int) and 0 <= token < self.vocabulary else 0


def _prepared(batch: _ModelCall, call: PromptCall) -> dict[str, Any] | None:
    """Note what a call is about, and return its arguments, if they must be others."""
    named, ids, cache = batch.named, batch.ids, batch.named.get("past_key_values")
    if ids is None:
        if any(batch.tokens(batch.rows)):
            raise RouteError(
                "the adapter in use puts virtual tokens into rows of input_ids, and there are none"
            )
        return None
    tokens = batch.tokens(len(ids))
    call.tokens = _positions(ids - batch.vocabulary, tokens)
    if is_filled(cache):
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


def _positions(numbers: Tensor, tokens: Sequence[VirtualTokens | None]) -> TokenPositions | None:
    """The positions of the virtual tokens that a batch already has.

    Raises:
        RouteError: a row has others than its adapter's.
    """
    # On the meta device ids have no values: none is taken for a virtual token.
    if numbers.is_meta:
        return None
    most = numbers.amax(1).tolist()
    if all(number < 0 for number in most):
        return None
    wrong = [
        f"row {row} has virtual token {number}, but its adapter has {len(own) if own else 0}"
        for row, (number, own) in enumerate(zip(most, tokens, strict=True))
        if number >= 0 and (own is None or number >= len(own))
    ]
    if wrong:
        raise RouteError.listing("some token ids are beyond the vocabulary", wrong)
    return TokenPositions(numbers)


def _longer(
    batch: _ModelCall, call: PromptCall, tokens: Sequence[VirtualTokens | None]
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
    _check_context(batch.model, longer)
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


def _check_context(model: nn.Module, rows: LongerRows) -> None:
    context = context_length(model)
    pairs = zip(rows.rows, rows.added, strict=True)
    longest = max(row.stop - row.start + added for row, added in pairs)
    if context is not None and longest > context:
        raise RouteError(
            f"a row has {longest} tokens with the trained ones, and the model's context is "
            f"{context}: shorten it"
        )
