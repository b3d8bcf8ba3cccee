"""One row that holds the tokens of many requests, each of which has an adapter of its own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Operation
from lorakit.layers.route import Frame
from lorakit.routing.choices import RowChoices


def of_tokens(choices: RowChoices, lengths: Sequence[int]) -> RowChoices:
    """The choices of each token, of those of requests with so many tokens.

    Raises:
        RouteError: there is not one length for each choice, or one is not positive.
    """
    given = choices.rows
    if given is None or len(lengths) != given:
        found = "one choice for all" if given is None else f"{given} choices"
        raise RouteError(f"{len(lengths)} lengths for {found}: give a choice for each length")
    wrong = next((length for length in lengths if length < 1), None)
    if wrong is not None:
        raise RouteError(f"a length is a number of tokens, 1 or more; found {wrong}")
    own = choices.index_of_row
    if len(own) == 1:
        return choices
    tokens = [index for index, count in zip(own, lengths, strict=True) for _ in range(count)]
    return replace(choices, index_of_row=tuple(tokens), rows=len(tokens))


def flattened(frame: Frame, tokens: int) -> Frame:
    """The frame of a batch of one row, of a frame whose rows are the row's tokens.

    Raises:
        RouteError: an adapter has virtual tokens, which would move the others.
    """
    operations = frame.operations or {}
    if any(any(each.tokens_of_rows(tokens)) for each in operations.values()):
        raise RouteError("an adapter with virtual tokens would move the tokens of other requests")
    views = _Views(tokens)
    return replace(
        frame,
        operations={number: _OfTokens(each, views) for number, each in operations.items()} or None,
    )


class _Views:
    """Inputs (1, tokens, …) as rows of one token each.

    The latest one is kept as long as somebody else does: layers that read one input recognise it.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._latest: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None

    def of(self, x: Tensor) -> Tensor:
        if self._latest is not None and self._latest[0]() is x:
            known = self._latest[1]()
            if known is not None:
                return known
        made = x.view(self.tokens, 1, *x.shape[2:])
        self._latest = weakref.ref(x), weakref.ref(made)
        return made


class _OfTokens(Operation):
    """An operation on rows of one token each, for the one row that these are in."""

    def __init__(self, own: Operation, views: _Views) -> None:
        self._own, self._views = own, views

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each token's own update.

        Raises:
            RouteError: the layer is given something else than the tokens of the route.
        """
        x, tokens = inputs[0], self._views.tokens
        if x.shape[:2] != (1, tokens):
            path = layer.adapter_path if isinstance(layer, AdaptedLayer) else "a layer"
            raise RouteError(
                f"the route is for one row of {tokens} tokens, but {path} was given an input of "
                f"shape {tuple(x.shape)}"
            )
        found = self._own.adapt(
            layer, (self._views.of(x.contiguous()), *inputs[1:]), output.flatten(0, 1)[:, None]
        )
        return found.view(1, tokens, *found.shape[2:])

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter, as the operation has it."""
        return self._own.read(name, weight, inside=inside)
