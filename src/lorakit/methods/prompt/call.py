"""One call of a model with virtual tokens: what it is given, and how its rows differ from that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation
from lorakit.layers.route import Frame, Route
from lorakit.layers.token_positions import TokenPositions
from lorakit.methods.prompt.insert import LongerRows
from lorakit.methods.prompt.kv_cache import CacheRecord
from lorakit.models.roles import row_embedding
from lorakit.models.shape import context_length
from lorakit.upstream.private_names import in_compiled_call

COMPILED = (
    "the adapter in use has virtual tokens, which can't be put into the rows of a compiled model: "
    "use the model as it was before torch.compile"
)

STATES: tuple[str, ...] = (
    "logits",
    "last_hidden_state",
    "hidden_states",
    "start_logits",
    "end_logits",
)
"""Outputs with a value for each token, where a model is one stack."""


@dataclass(kw_only=True)
class PromptCall:
    """A call of a model with virtual tokens: how its rows differ from the caller's."""

    module: nn.Module
    """Whose call it is: the model's, or its encoder's alone."""
    states: tuple[str, ...] = STATES
    """The outputs with a value for each token."""
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
    mask: Tensor | None = None
    """(rows, tokens), the mask of the rows that an encoder reads; None: they have none of these
    tokens."""


@dataclass(frozen=True, eq=False)
class CallFrame(Frame):
    """The frame of a call, with what is needed to know of it when it ends."""

    call: PromptCall = field(kw_only=True)


def begin(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    prepare: Callable[[GivenCall, PromptCall], dict[str, Any] | None],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Begin a call: its frame is on top of this thread's, and its arguments are returned.

    Args:
        module: what is called.
        args: of the call.
        kwargs: of the call.
        prepare: notes what the call is about, and returns its arguments, if they must be others.

    Raises:
        RouteError: virtual tokens cannot be put in, or a row has others than its adapter's.
    """
    embedding = cast(Any, row_embedding(module))
    route: Route | None = getattr(embedding, "adapter_route", None)
    if route is None:
        return None
    batch = GivenCall(module, embedding, _by_name(module, args, kwargs), route)
    # Compiled code would keep what it read of one call for all later calls.
    if in_compiled_call():
        if any(batch.tokens(batch.rows)):
            raise RouteError(COMPILED)
        return None
    call = PromptCall(module=module)
    changed = prepare(batch, call)
    route.own.stack.append(CallFrame(**vars(route.of_call(call.tokens)), call=call))
    return None if changed is None else ((), changed)


def end(module: nn.Module) -> PromptCall | None:
    """End the call of a module, if one of its own is under way, and tell what it was about."""
    call = call_under_way(module)
    if call is None or call.module is not module:
        return None
    cast(Any, row_embedding(module)).adapter_route.own.stack.pop()
    return call


def call_under_way(module: nn.Module) -> PromptCall | None:
    """The call, of this module or of one that it is in, that runs in this thread."""
    route: Route | None = getattr(row_embedding(module), "adapter_route", None)
    frame = route.own.stack[-1] if route is not None and route.own.stack else None
    return frame.call if isinstance(frame, CallFrame) else None


def _by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    if not args:
        return dict(kwargs)
    names = list(inspect.signature(model.forward).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


@dataclass(frozen=True)
class GivenCall:
    """One call: the model, and what it is called with."""

    model: nn.Module
    embedding: AdaptedLayer
    named: dict[str, Any]
    route: Route

    @property
    def ids(self) -> Tensor | None:
        """(rows, tokens); None: there are none.

        Raises:
            RouteError: the adapter in use needs some.
        """
        if self.named.get("input_ids") is None and any(self.tokens(self.rows)):
            raise RouteError(
                "the adapter in use puts virtual tokens into rows of input_ids, and there are none"
            )
        return self.named.get("input_ids")

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the embedding has."""
        return cast(Any, self.embedding).num_embeddings

    @property
    def rows(self) -> int:
        """The rows of the first tensor."""
        named = (self.named.get("input_ids"), *self.named.values())
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


def positions_of(numbers: Tensor, tokens: Sequence[VirtualTokens | None]) -> TokenPositions | None:
    """The positions of the virtual tokens that a batch already has.

    Raises:
        RouteError: a row has others than its adapter's.
    """
    # On the meta device ids have no values, nor while a CUDA graph is recorded: none is taken for a
    # virtual token.
    if numbers.is_meta or (numbers.is_cuda and torch.cuda.is_current_stream_capturing()):
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


def check_context(model: nn.Module, rows: LongerRows) -> None:
    """Make sure that the model has positions for the longer rows.

    Raises:
        RouteError: it has not.
    """
    context = context_length(model)
    pairs = zip(rows.rows, rows.added, strict=True)
    longest = max(row.stop - row.start + added for row, added in pairs)
    if context is not None and longest > context:
        raise RouteError(
            f"a row has {longest} tokens with the trained ones, and the model's context is "
            f"{context}: shorten it"
        )
