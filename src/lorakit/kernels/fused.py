"""output += scale·B·A·x in place, with gradients that need only x itself and A·x to be kept.

Autograd by itself would keep a copy of x in the precision of A and B for each adapted layer, and
masks of dropout. Here x is the very tensor that the layer was given, converted in pieces that stay
in the processor's cache; nothing of B·A's size is formed, and A·x has rank columns:

    h = A·drop(x)           output += scale·B·h
    ∂h = scale·Bᵀ·∂output   ∂B = scale·∂output·hᵀ   ∂A = ∂h·drop(x)ᵀ   ∂x = drop(Aᵀ·∂h)

Several A and B can change one output: slices of a fused layer, adapters that add up, adapters that
have their own tokens. `lorakit.kernels.plain` is the reference implementation; `available` says
when this one is used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.kernels import choice
from lorakit.kernels.dropout import Dropout
from lorakit.kernels.stand_in import kind_of_device
from lorakit.upstream.private_names import functorch_is_active, is_traced, is_view

_PIECE = 256
"""Tokens that are converted at once on CPUs: 1.5 MB of float32 at 1536 features, and large buffers
are slow there, as each of their pages is mapped anew (2 to 4 times at 2048 tokens)."""


class FactorUse(NamedTuple):
    """The use of one A and one B: scale, output rows and dropout, without their values."""

    scale: float
    entries: slice | Tensor | None = None
    """Output rows that B has: a range of them, or their numbers (int64). None: all."""
    dropout: Dropout | None = None

    @property
    def factor(self) -> float:
        """The factor on B·A·x, where dropped elements of x are 0 and the others as is."""
        return self.scale * self.dropout.factor if self.dropout else self.scale

    def add(self, onto: Tensor, h: Tensor, b: Tensor) -> None:
        """Add factor·B·h to some tokens of an output, (tokens, d_out); h is (rank, tokens)."""
        if isinstance(self.entries, slice):
            onto = onto[:, self.entries]
        if onto.dtype == b.dtype and not isinstance(self.entries, Tensor):
            onto.addmm_(h.T, b.T, alpha=self.factor)
            return
        update = h.T @ b.T
        update = (update if self.factor == 1 else update.mul_(self.factor)).to(onto.dtype)
        if isinstance(self.entries, Tensor):
            onto.index_add_(1, self.entries, update)
        else:
            onto.add_(update)

    def of_output(self, grad: Tensor) -> Tensor:
        """The entries of an output's gradient, (tokens, d_out), for which B has rows."""
        if isinstance(self.entries, Tensor):
            return grad.index_select(1, self.entries)
        return grad if self.entries is None else grad[:, self.entries]


class Factors(NamedTuple):
    """A and B of one adapter for one layer or a slice of it."""

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    use: FactorUse


class Span(NamedTuple):
    """Neighbouring tokens, all rows of a batch counted through, and what changes them."""

    start: int
    stop: int
    factors: tuple[int, ...]
    """Places in the list of factors; at least one."""


def available(x: Tensor, *, training: bool) -> bool:
    """Whether a layer with this input is to be computed here.

    Args:
        x: the input.
        training: whether the layer is in training mode: then without gradients, too, because
            reentrant checkpointing must compute the same both times.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_traced()
        and (training or torch.is_grad_enabled())
        and choice.fast()
        and not torch.is_autocast_enabled(kind_of_device(x))
        and not functorch_is_active()
    )


def add_updates(
    output: Float[Tensor, "*tokens d_out"],
    x: Float[Tensor, "*tokens d_in"],
    factors: Sequence[Factors],
    spans: Sequence[Span],
) -> Float[Tensor, "*tokens d_out"]:
    """Add scale·B·A·x to a layer's output, in the precision of A and B, and return the output.

    Args:
        output: the layer's own result, which is overwritten where autograd has no view of it.
        x: the layer's input. It is kept for the backward pass, as is A·x.
        factors: for any part of the output; they may overlap.
        spans: which factors change which tokens, in ascending order and without overlap. Other
            tokens keep every bit.
    """
    if is_view(output) or not output.is_contiguous():
        # Writing into a view would make autograd copy the gradient of what it is a view of.
        output = output.clone(memory_format=torch.contiguous_format)
    weights = (weight for each in factors for weight in (each.a, each.b))
    return _AddUpdates.apply(output, x, _Schedule.of(x, factors, spans), *weights)


class _Piece(NamedTuple):
    """Some tokens of a span."""

    tokens: slice
    factors: tuple[tuple[int, slice], ...]
    """The factors, and where the tokens are among all those that the factor changes."""


@functools.lru_cache(maxsize=64)
def _pieces(spans: tuple[Span, ...], factors: int, size: int) -> tuple[_Piece, ...]:
    """The spans in pieces of at most so many tokens; all layers ask for the same."""
    pieces, done = [], [0] * factors
    for span in spans:
        for start in range(span.start, span.stop, size):
            tokens = slice(start, min(start + size, span.stop))
            before = {n: done[n] for n in span.factors}
            for n in span.factors:
                done[n] += tokens.stop - start
            pieces.append(_Piece(tokens, tuple((n, slice(before[n], done[n])) for n in before)))
    return tuple(pieces)


class _Schedule(NamedTuple):
    """The computation of a call without any values: uses and pieces, which autograd keeps."""

    uses: tuple[FactorUse, ...]
    pieces: tuple[_Piece, ...]
    widest: torch.dtype
    """A precision that holds that of every A."""

    @staticmethod
    def of(x: Tensor, factors: Sequence[Factors], spans: Sequence[Span]) -> _Schedule:
        uses = tuple(each.use for each in factors)
        widest = functools.reduce(torch.promote_types, (each.a.dtype for each in factors))
        copies = x.dtype != widest or any(use.dropout for use in uses)
        size = _PIECE if copies and kind_of_device(x) == "cpu" else max(1, x.shape[:-1].numel())
        return _Schedule(uses, _pieces(tuple(spans), len(uses), size), widest)

    def masks(self, width: int, device: torch.device) -> list[Tensor | None]:
        """The dropout mask of each factor on the inputs of its tokens; None: it drops nothing."""
        if not any(use.dropout for use in self.uses):
            return [None] * len(self.uses)
        # The last piece of a factor ends where its tokens end.
        tokens = {n: own.stop for piece in self.pieces for n, own in piece.factors}
        return [
            use.dropout.mask(tokens.get(n, 0), width, device) if use.dropout else None
            for n, use in enumerate(self.uses)
        ]


class _AddUpdates(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, plan: _Schedule, *weights: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        a, b = weights[::2], weights[1::2]
        tokens, into = _flat(x), output.view(-1, output.shape[-1])
        masks = plan.masks(x.shape[-1], x.device)
        kept: list[list[Tensor]] = [[] for _ in a]
        for piece in plan.pieces:
            wide = tokens[piece.tokens].to(plan.widest)
            for n, own in piece.factors:
                h = a[n] @ _masked(wide.to(a[n].dtype), masks[n], own).T
                kept[n].append(h)
                plan.uses[n].add(into[piece.tokens], h, b[n])
        _, _, _, *for_weights = ctx.needs_input_grad
        ctx.plan, ctx.shape, ctx.dtype = plan, x.shape, x.dtype
        all_of_h = [torch.cat(of_n, dim=1) if of_n else None for of_n in kept]
        ctx.save_for_backward(x if any(for_weights[::2]) else None, *weights, *all_of_h)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, (x, *saved) = ctx.plan, ctx.saved_tensors
        _, for_x, _, *for_weights = ctx.needs_input_grad
        weights, kept = saved[: len(for_weights)], saved[len(for_weights) :]
        sums = _Sums(plan.uses, weights, for_weights)
        masks = plan.masks(ctx.shape[-1], grad.device)
        tokens, of_output = None if x is None else _flat(x), _flat(grad)
        of_x: list[Tensor] = []
        for piece in plan.pieces:
            wide = None if tokens is None else tokens[piece.tokens].to(plan.widest)
            parts = []
            for n, own in piece.factors:
                of_h = sums.of_h(n, of_output[piece.tokens], kept[n][:, own])
                if wide is not None:
                    sums.add_to_a(n, of_h, _masked(wide.to(of_h.dtype), masks[n], own))
                if for_x:
                    parts.append(_masked(of_h.T @ weights[2 * n], masks[n], own))
            if for_x:
                of_x.append(functools.reduce(torch.add, parts).to(ctx.dtype))
        whole = _joined(plan.pieces, of_x, ctx.shape) if for_x else None
        return grad, whole, None, *sums.gradients()


class _Sums:
    """The gradients of all A and B, which grow piece by piece, in float32 at least."""

    def __init__(
        self, uses: Sequence[FactorUse], weights: Sequence[Tensor], wanted: Sequence[bool]
    ) -> None:
        self._uses = uses
        self._weights = weights
        self._wanted = wanted
        self._sums: list[Tensor | None] = [None] * len(weights)

    def of_h(self, n: int, of_output: Tensor, h: Tensor) -> Tensor:
        """The gradient of one factor's A·x, (rank, tokens), and add what is B's."""
        use, b = self._uses[n], self._weights[2 * n + 1]
        own = use.of_output(of_output).to(b.dtype)
        # Transposed, which makes the matmul faster.
        self._add(2 * n + 1, h, own)
        of_h = b.T @ own.T
        return of_h if use.factor == 1 else of_h.mul_(use.factor)

    def add_to_a(self, n: int, of_h: Tensor, x: Tensor) -> None:
        """Add to the gradient of one factor's A."""
        self._add(2 * n, of_h, x)

    def gradients(self) -> list[Tensor | None]:
        """The gradients of all A and B, in their order."""
        found: list[Tensor | None] = []
        for number, (total, weight) in enumerate(zip(self._sums, self._weights, strict=True)):
            if total is None:
                # No token uses it.
                found.append(torch.zeros_like(weight) if self._wanted[number] else None)
            elif number % 2:
                found.append(total.mul_(self._uses[number // 2].factor).T.to(weight.dtype))
            else:
                found.append(total.to(weight.dtype))
        return found

    def _add(self, number: int, left: Tensor, right: Tensor) -> None:
        if not self._wanted[number]:
            return
        total, matmul = self._sums[number], left @ right
        if total is None:
            exact = torch.promote_types(matmul.dtype, torch.float32)
            self._sums[number] = matmul.to(exact)
        else:
            total += matmul


def _joined(pieces: Sequence[_Piece], parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """The gradient of x from that of each piece; it is zero at other tokens."""
    if sum(map(len, parts)) == shape[:-1].numel():
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).view(shape)
    joined = parts[0].new_zeros(shape)
    for piece, part in zip(pieces, parts, strict=True):
        _flat(joined)[piece.tokens] = part
    return joined


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _masked(x: Tensor, mask: Tensor | None, own: slice) -> Tensor:
    return x if mask is None else x * mask[own]
