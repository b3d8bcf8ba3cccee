"""One row that holds the tokens of many requests, each of which has an adapter of its own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
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


@dataclass(frozen=True)
class RowsOfTokens:
    """Neighbouring tokens of a flattened row: so many of each of some rows, one row after another.

    They are computed as the batch of these rows would be.
    """

    frame: Frame
    """The operations of the rows."""
    rows: int
    tokens: int
    """Of each row."""


def flattened(parts: Sequence[RowsOfTokens]) -> Frame:
    """The frame of a batch of one row whose tokens are those of some parts.

    Raises:
        RouteError: an adapter has virtual tokens, which would move the others.
    """
    operations = [part.frame.operations or {} for part in parts]
    for part, own in zip(parts, operations, strict=True):
        if any(any(each.tokens_of_rows(part.rows)) for each in own.values()):
            raise RouteError(
                "an adapter with virtual tokens would move the tokens of other requests"
            )
    views = _Views(parts)
    numbers = {number: None for own in operations for number in own}
    of_parts = {
        number: _OfParts([own.get(number) for own in operations], views) for number in numbers
    }
    frame = parts[0].frame if len(parts) == 1 else Frame(key=object())
    return replace(frame, operations=of_parts or None, rows=1)


class _Views:
    """The parts of inputs (1, tokens, …), each as the rows (rows, tokens, …) that are in it.

    The latest ones are kept as long as somebody else does: layers that read one input recognise it.
    """

    def __init__(self, parts: Sequence[RowsOfTokens]) -> None:
        ends = list(accumulate(part.rows * part.tokens for part in parts))
        self.tokens = ends[-1]
        self._places = [
            (end - part.rows * part.tokens, end, part.rows)
            for part, end in zip(parts, ends, strict=True)
        ]
        self._input: weakref.ref[Tensor] | None = None
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def of(self, x: Tensor, part: int) -> Tensor:
        """A part of an input, by its number."""
        if self._input is None or self._input() is not x:
            self._input, self._known = weakref.ref(x), {}
        known = self._known[part]() if part in self._known else None
        if known is None:
            known = self.within(x, part)
            self._known[part] = weakref.ref(known)
        return known

    def within(self, x: Tensor, part: int) -> Tensor:
        """A part of a tensor that is seen for the first time."""
        start, end, rows = self._places[part]
        return x[0, start:end].view(rows, -1, *x.shape[2:])


class _OfParts(Operation):
    """Operations on the parts of a row of tokens; None: the base answers there."""

    def __init__(self, own: Sequence[Operation | None], views: _Views) -> None:
        self._own, self._views = own, views

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each token's own update.

        Raises:
            RouteError: the layer is given something else than the tokens of the route.
        """
        x, tokens = inputs[0], self._views.tokens
        if x.shape[:2] != (1, tokens) or output.shape[:2] != (1, tokens):
            path = layer.adapter_path if isinstance(layer, AdaptedLayer) else "a layer"
            raise RouteError(
                f"the route is for one row of {tokens} tokens, but {path} was given an input of "
                f"shape {tuple(x.shape)}, and makes one of {tuple(output.shape)}"
            )
        x, output = x.contiguous(), output.contiguous()
        for part, operation in enumerate(self._own):
            if operation is None:
                continue
            before = self._views.within(output, part)
            found = operation.adapt(layer, (self._views.of(x, part), *inputs[1:]), before)
            if len(self._own) == 1:
                return found.view(1, tokens, *found.shape[2:])
            if found.data_ptr() != before.data_ptr():
                before.copy_(found)
        return output

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter, as the operations have it.

        Raises:
            RouteError: the parts need different ones.
        """
        if len(self._own) > 1 and not inside:
            raise RouteError(
                "an adapted layer has a weight that the model reads by itself, once for all tokens"
            )
        for operation in self._own:
            weight = weight if operation is None else operation.read(name, weight, inside=inside)
        return weight
