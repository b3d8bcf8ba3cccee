"""Rows of one batch with adapters of their own: the operation of each layer for such a batch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapter.site import RowRanges
from lorakit.kernels import choice, fused, grouped
from lorakit.kernels.grouping import Grouping, group_rows
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import check_rows_first
from lorakit.layers.operation import Operation, Update
from lorakit.methods.lora.lora import LowRank, is_linear, positions
from lorakit.methods.lora.update import LoRAUpdate
from lorakit.models.routers import is_own_kind
from lorakit.routing.choices import RowChoices, Terms, UpdatesByName
from lorakit.routing.experts_of_rows import operations_of_experts, parted
from lorakit.routing.router_rows import RouterRows
from lorakit.routing.row_groups import ByRowGroup, read_for_all
from lorakit.routing.row_updates import KeptProjection, add_to_rows, bias_shifts
from lorakit.routing.stacked_heads import StackedHeads, are_heads


def mixed_operations(
    layers: Mapping[int, AdaptedLayer],
    updates: UpdatesByName,
    choices: RowChoices,
    device: torch.device,
) -> dict[int, Operation]:
    """The operation of each layer with which every row uses its own combination.

    Frozen A and B are gathered here, once; those under training are gathered in each forward pass.

    Args:
        layers: the adapted layers by number.
        updates: of every adapter that a row uses.
        choices: of the rows.
        device: where the rows are.

    Raises:
        RouteError: full copies of one module that can't be added up.
    """
    operations: dict[int, Operation] = {}
    if len(choices.index_of_row) > 1:
        updates, inside = parted(layers, updates)

        def of_one(one: RowChoices) -> Mapping[int, Operation]:
            if one.only_adapter is not None:
                return inside[one.only_adapter]
            return mixed_operations(layers, {n: inside[n] for n in one.names}, one, device)

        operations |= operations_of_experts(layers, inside, choices, device, of_one)
    groupings = _Groupings(choices, device)
    for numbers in _by_input(layers, updates):
        terms = {number: _terms(number, updates, choices) for number in numbers}
        stacked = [number for number in numbers if _is_stackable(layers[number], terms[number])]
        pieces = [p for n in stacked for p in _pieces(n, cast(LowRankTerms, terms[n]))]
        inputs = [SharedInput(same, groupings) for same in _of_equal_rows(pieces)]
        for number in numbers:
            if number not in stacked:
                kind = _kind(layers[number], terms[number])
                operations[number] = kind(layers[number], terms[number], choices, device)
                continue
            parts = tuple(
                (shared, at)
                for shared in inputs
                for at, piece in enumerate(shared.pieces)
                if piece.number == number
            )
            operations[number] = StackedLoRA(
                parts, cast(LowRankTerms, terms[number]), choices, device
            )
    return operations


LowRankTerms = dict[int, list[tuple[LoRAUpdate, float]]]
"""The terms of a layer whose updates are all low-rank."""


class _Groupings:
    """The groupings of a batch by some of its combinations; layers with the same ones share one."""

    def __init__(self, choices: RowChoices, device: torch.device) -> None:
        self._choices = choices
        self._device = device
        self._made: dict[tuple[tuple[int, ...], torch.dtype], Grouping] = {}

    def of(self, indices: tuple[int, ...], dtype: torch.dtype) -> Grouping:
        if (indices, dtype) not in self._made:
            rows = self._choices.among(indices)
            self._made[indices, dtype] = group_rows(rows, device=self._device, dtype=dtype)
        return self._made[indices, dtype]


def _by_input(layers: Mapping[int, AdaptedLayer], updates: UpdatesByName) -> Iterator[list[int]]:
    """Yield the numbers of the touched layers, those that read one input together."""
    together: dict[str, list[int]] = {}
    for number in sorted({number for own in updates.values() for number in own}):
        together.setdefault(layers[number].adapter_input, []).append(number)
    yield from together.values()


def _kind(layer: AdaptedLayer, terms: Terms) -> type[ByRowGroup]:
    """The operation of a layer whose updates are not stacked."""
    if is_own_kind(layer):
        return RouterRows
    return StackedHeads if are_heads(terms) else ByRowGroup


def _terms(number: int, updates: UpdatesByName, choices: RowChoices) -> Terms:
    found = {
        index: [(updates[name][number], w) for name, w in combination if number in updates[name]]
        for index, combination in enumerate(choices.combinations)
    }
    return {index: terms for index, terms in found.items() if terms}


def _is_stackable(layer: nn.Module, terms: Terms) -> bool:
    """Whether all rows can be computed at once, and not one group after the other."""
    every = (update for own in terms.values() for update, _ in own)
    return choice.fast() and is_linear(layer) and all(map(is_sum, every))


def is_sum(update: Update) -> bool:
    """Whether an update only adds B·A·x and a bias, so that several can be stacked."""
    return isinstance(update, LoRAUpdate) and update.is_additive


@dataclass(frozen=True)
class Piece:
    """Updates of the same output rows of one layer, of one precision and about the same rank."""

    number: int
    """The layer's."""
    rows: RowRanges | None
    """Output rows; None: all."""
    indices: tuple[int, ...]
    """Of the combinations."""
    terms: tuple[tuple[tuple[LowRank, float], ...], ...]
    """For each combination, A and B, and the weights."""

    @cached_property
    def rank(self) -> int:
        """The rank to which A and B of each combination are padded."""
        return max(map(_rank, self.terms))

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which it is computed."""
        return _dtype(self.terms[0])


def _rank(terms: Sequence[tuple[LowRank, float]]) -> int:
    return sum(part.site.rank for part, _ in terms)


def _dtype(terms: Sequence[tuple[LowRank, float]]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (part.lora_a.dtype for part, _ in terms))


def _pieces(number: int, terms: LowRankTerms) -> Iterator[Piece]:
    """Yield the pieces of a layer; padding a rank to its piece's less than doubles it."""
    by_rows: dict[RowRanges | None, dict[int, list[tuple[LowRank, float]]]] = {}
    for index, own in terms.items():
        for update, weight in own:
            for part in update.parts.values():
                assert isinstance(part, LowRank)
                at = by_rows.setdefault(part.site.rows, {})
                at.setdefault(index, []).append((part, weight))
    for rows, by_index in by_rows.items():
        alike: dict[tuple[int, torch.dtype], list[int]] = {}
        for index, parts in by_index.items():
            # No row is computed in another precision because of its neighbours.
            alike.setdefault(((_rank(parts) - 1).bit_length(), _dtype(parts)), []).append(index)
        for same in alike.values():
            yield Piece(number, rows, tuple(same), tuple(tuple(by_index[i]) for i in same))


def _of_equal_rows(pieces: Sequence[Piece]) -> list[list[Piece]]:
    together: dict[tuple[tuple[int, ...], torch.dtype], list[Piece]] = {}
    for piece in pieces:
        together.setdefault((piece.indices, piece.dtype), []).append(piece)
    return list(together.values())


class SharedInput:
    """Pieces that read one input: their A's are concatenated, so that one matmul serves them all.

    A layer that reads something else after all gets a matmul of its own.
    """

    def __init__(self, pieces: Sequence[Piece], groupings: _Groupings) -> None:
        self.pieces = tuple(pieces)
        parts = [part for piece in pieces for terms in piece.terms for part, _ in terms]
        self._dtype = pieces[0].dtype
        self.grouping = groupings.of(pieces[0].indices, self._dtype)
        self._drops = any(part.dropout for part in parts)
        self._trains = any(p.requires_grad for part in parts for p in part.parameters())
        stops = torch.tensor([piece.rank for piece in pieces]).cumsum(0).tolist()
        self._columns = [slice(end - p.rank, end) for end, p in zip(stops, pieces, strict=True)]
        self._a = None if self._trains else self._stacked_a()
        self._b = None if self._trains else [self._stacked_b(at) for at in range(len(pieces))]
        self._projection = KeptProjection(len(pieces))

    @property
    def is_fixed(self) -> bool:
        """Whether nothing of it is trained or dropped."""
        return not (self._trains or self._drops)

    def add(self, at: int, x: Tensor, output: Tensor) -> Tensor:
        """Add the update of one piece to a layer's output, or to the piece's entries of it."""
        b = self._stacked_b(at) if self._b is None else self._b[at]
        return grouped.up_project_onto(output, self._down_project(at, x), b, self.grouping)

    def _down_project(self, at: int, x: Tensor) -> Tensor:
        """A·x of one piece, (groups, tokens, rank)."""
        columns = self._columns[at]
        terms = self.pieces[at].terms
        drops = self._drops and any(part.training for own in terms for part, _ in own)
        if not (drops or len(self.pieces) == 1 or torch.compiler.is_compiling()):
            return self._projection.of(x, lambda: self._projected(x))[..., columns]
        # Every layer drops other elements, so that nothing can be shared.
        return self._projected(self._dropped(at, x) if drops else x, columns)

    def _projected(self, x: Tensor, columns: slice = slice(None)) -> Tensor:
        a = self._stacked_a() if self._a is None else self._a
        return grouped.down_project(x, a[:, columns], self.grouping)

    def _dropped(self, at: int, x: Tensor) -> Tensor:
        """The input with elements dropped, in each row with its own adapter's probability."""
        rates = [max(part.dropout for part, _ in terms) for terms in self.pieces[at].terms]
        by_row = [1 - rates[own] if own >= 0 else 1.0 for own in self.grouping.index_of_row]
        keep = torch.tensor(by_row, device=x.device).repeat_interleave(x.shape[0] // len(by_row))
        keep = keep.reshape(-1, *[1] * (x.dim() - 1))
        kept = torch.rand(x.shape, device=x.device) < keep
        return x * (kept / keep).to(x.dtype)

    def _stacked_a(self) -> Tensor:
        """A, (groups, ranks of all pieces, d_in)."""
        by_place = zip(*([_a(t, p.rank) for t in p.terms] for p in self.pieces), strict=True)
        stack = torch.stack([torch.cat(each) for each in by_place])
        return grouped.gather(stack.to(self._dtype), self.grouping)

    def _stacked_b(self, at: int) -> Tensor:
        """scale·Bᵀ of one piece, (groups, rank, d_out)."""
        piece = self.pieces[at]
        stack = torch.stack([_b(terms, piece.rank) for terms in piece.terms])
        scales = [_scales(terms, piece.rank) for terms in piece.terms]
        factors = torch.tensor(scales, dtype=self._dtype, device=stack.device)
        scaled = stack.to(self._dtype) * factors[:, None]
        return grouped.gather(scaled.mT.contiguous(), self.grouping)


def _a(terms: Sequence[tuple[LowRank, float]], rank: int) -> Tensor:
    """A of one combination, (rank, d_in), padded with zeros."""
    matrices = [part.a for part, _ in terms]
    joined = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    missing = rank - joined.shape[0]
    return F.pad(joined, (0, 0, 0, missing)) if missing else joined


def _b(terms: Sequence[tuple[LowRank, float]], rank: int) -> Tensor:
    """B of one combination, (d_out, rank), padded with zeros."""
    matrices = [part.b for part, _ in terms]
    joined = matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)
    missing = rank - joined.shape[1]
    return F.pad(joined, (0, missing)) if missing else joined


def _scales(terms: Sequence[tuple[LowRank, float]], rank: int) -> list[float]:
    """The factor on each column of B."""
    factors = [part.site.scale * w for part, w in terms for _ in range(part.site.rank)]
    return factors + [0.0] * (rank - len(factors))


@dataclass(frozen=True)
class BiasShift:
    """What trained biases, and those of B, add to the base's own, row by row."""

    term_of_row: Tensor
    """For each row an index into `terms`, counted from 1; 0: the base."""
    terms: tuple[tuple[tuple[LoRAUpdate, float], ...], ...]

    def add(self, layer: nn.Module, output: Tensor) -> Tensor:
        """The output, (rows·k, …, d_out), with each row's shift added."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        shifts = bias_shifts(layer, self.terms, dtype)
        return add_to_rows(output, shifts[self.term_of_row])


def _bias(terms: LowRankTerms, choices: RowChoices, device: torch.device) -> BiasShift | None:
    found = {
        index: tuple((update, weight) for update, weight in own if update.has_shift)
        for index, own in terms.items()
    }
    found = {index: biases for index, biases in found.items() if biases}
    if not found:
        return None
    term_of_row = torch.tensor(choices.among(tuple(found)), device=device) + 1
    return BiasShift(term_of_row, tuple(found.values()))


class Unstacked:
    """The updates of a linear layer for the fused kernel: each A and B where it is, not copied.

    So training keeps no copies of the weights for the backward pass, and drops the elements of the
    input that a run alone drops.
    """

    def __init__(self, terms: LowRankTerms, choices: RowChoices) -> None:
        self._terms = [term for own in terms.values() for term in own]
        self._runs: list[tuple[int, int, tuple[int, ...]]] = []
        numbers = iter(range(sum(len(update.parts) for update, _ in self._terms)))
        factors = {
            index: tuple(next(numbers) for update, _ in own for _ in update.parts)
            for index, own in terms.items()
        }
        start = 0
        for index, rows in itertools.groupby(choices.index_of_row):
            stop = start + len(list(rows))
            if factors.get(index):
                self._runs.append((start, stop, factors[index]))
            start = stop

    def add(self, x: Tensor, output: Tensor, *, per_row: int) -> Tensor:
        """The output with each row's own update added; a row has so many tokens."""
        factors = [each for update, weight in self._terms for each in update.factors(weight)]
        spans = [fused.Span(i * per_row, j * per_row, numbers) for i, j, numbers in self._runs]
        return fused.add_updates(output, x, factors, spans)


class StackedLoRA(Operation):
    """Low-rank updates of a Linear or Conv1D, all rows at once."""

    def __init__(
        self,
        parts: Sequence[tuple[SharedInput, int]],
        terms: LowRankTerms,
        choices: RowChoices,
        device: torch.device,
    ) -> None:
        self._parts = tuple(parts)
        self._bias = _bias(terms, choices, device)
        self._rows = len(choices.index_of_row)
        self._terms = terms.get(choices.index_of_row[0], [])
        triton = any(shared.grouping.kernels == "triton" for shared, _ in parts)
        fixed = all(shared.is_fixed for shared, _ in parts)
        self._unstacked = None if triton or fixed else Unstacked(terms, choices)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with each row's own update added."""
        x = inputs[0]
        if self._rows > 1:
            check_rows_first(cast(AdaptedLayer, layer), x, self._rows)
        if self._unstacked is not None and fused.available(x, training=layer.training):
            per_row = self._parts[0][0].grouping.per_row(x)
            output = self._unstacked.add(x, output, per_row=per_row)
        else:
            output = self._add_stacked(x, output)
        return output if self._bias is None else self._bias.add(layer, output)

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """A parameter with the updates of the one combination that all rows use."""
        return read_for_all(self._terms, self._rows, name, weight, inside=inside)

    def _add_stacked(self, x: Tensor, output: Tensor) -> Tensor:
        for shared, at in self._parts:
            rows = shared.pieces[at].rows
            if rows is None:
                output = shared.add(at, x, output)
            elif len(rows) == 1:
                shared.add(at, x, output[..., rows[0][0] : rows[0][1]])
            else:
                index = positions(rows, output.device)
                part = shared.add(at, x, output.index_select(-1, index))
                output = output.index_copy(-1, index, part)
        return output
