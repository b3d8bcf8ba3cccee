"""The update of a mixed batch in Triton; experimental, as no GPU result is committed yet.

A block is a few tokens that use one adapter, so that a program reads the adapter's weights once
(the idea of Punica's SGMV, Chen et al. 2023, section 4). There are two kernels.
`_rows_times_matrix` is the down-projection, the up-projection and both gradients of inputs, since
strides transpose a matrix; `_outer_products` is the gradient of A and of B. All sums are in
float32, in an order that does not depend on timing. `lorakit.kernels.grouped` calls this module;
importing it imports Triton.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lorakit.kernels.grouping import Grouping

# The kernels have no shape checks (`no_type_check`), because Triton reads their source.


def _configs(names: Sequence[str], sizes: Sequence[Sequence[int]]) -> list[triton.Config]:
    """The configurations to measure; one in the interpreter, which cannot measure.

    None splits a sum in another way, so that the result does not depend on the choice.
    """
    if triton.knobs.runtime.interpret:
        sizes = sizes[:1]
    return [
        triton.Config(dict(zip(names, size, strict=True)), num_warps=4, num_stages=stages)
        for size in sizes
        for stages in ((3,) if len(sizes) == 1 else (2, 4))
    ]


def _sensible(
    configs: list[triton.Config], arguments: Mapping[str, Any], **others: Any
) -> list[triton.Config]:
    """The configurations whose tiles are not mostly empty, and quick to compile.

    The compiler unrolls matmuls of float32: more than 2¹⁷ multiplications took it 3 to 10 seconds.
    """
    given = {**arguments, **others}
    depth = given["BLOCK_TOKENS"] * given.get("BLOCK_IN", given.get("BLOCK_RANK"))
    narrowest = min(config.kwargs["BLOCK_OUT"] for config in configs)
    widest = max(narrowest, min(_tile(given["d_out"], 128), 2**17 // depth))
    return [config for config in configs if config.kwargs["BLOCK_OUT"] <= widest]


@triton.autotune(
    _configs(["BLOCK_OUT"], [(32,), (16,), (64,), (128,)]),
    key=["d_in", "d_out", "BLOCK_TOKENS"],
    prune_configs_by={"early_config_prune": _sensible},
    restore_value=["out"],
)
@triton.jit
@no_type_check
def _rows_times_matrix(
    x,
    w,
    out,
    rows,
    adapters,
    starts,
    stops,
    per_row,
    d_in,
    d_out,
    x_token,
    x_in,
    w_adapter,
    w_in,
    w_out,
    out_token,
    out_out,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """out[token] (+)= x[token] · w[adapter of token], for one block and one tile of features."""
    block = tl.program_id(0)
    matrix = w + tl.load(adapters + block).to(tl.int64) * w_adapter
    place = tl.load(starts + block) + tl.arange(0, BLOCK_TOKENS)
    live = place < tl.load(stops + block)
    row = tl.load(rows + place // per_row, mask=live, other=0).to(tl.int64)
    token = row * per_row + place % per_row
    column = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        x_tile = tl.load(
            x + token[:, None] * x_token + inner[None, :] * x_in,
            mask=live[:, None] & (inner[None, :] < d_in),
            other=0.0,
        )
        w_tile = tl.load(
            matrix + inner[:, None] * w_in + column[None, :] * w_out,
            mask=(inner[:, None] < d_in) & (column[None, :] < d_out),
            other=0.0,
        )
        total = tl.dot(x_tile.to(w_tile.dtype), w_tile, total, input_precision=PRECISION)
    target = out + token[:, None] * out_token + column[None, :] * out_out
    mask = live[:, None] & (column[None, :] < d_out)
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.autotune(
    _configs(["BLOCK_OUT"], [(32,), (64,), (128,)]),
    key=["rank", "d_out"],
    prune_configs_by={"early_config_prune": _sensible},
)
@triton.jit
@no_type_check
def _outer_products(
    h,
    y,
    out,
    rows,
    bounds,
    per_row,
    rank,
    d_out,
    h_token,
    h_rank,
    y_token,
    y_out,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """out[adapter] = Σ h[token]ᵀ · y[token] over its tokens, for one tile of the matrix."""
    adapter = tl.program_id(0)
    first = tl.load(bounds + adapter)
    stop = tl.load(bounds + adapter + 1)
    line = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    column = tl.program_id(2) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_RANK, BLOCK_OUT), dtype=tl.float32)
    for start in range(first, stop, BLOCK_TOKENS):
        place = start + tl.arange(0, BLOCK_TOKENS)
        live = place < stop
        row = tl.load(rows + place // per_row, mask=live, other=0).to(tl.int64)
        token = row * per_row + place % per_row
        h_tile = tl.load(
            h + token[None, :] * h_token + line[:, None] * h_rank,
            mask=live[None, :] & (line[:, None] < rank),
            other=0.0,
        ).to(out.dtype.element_ty)
        y_tile = tl.load(
            y + token[:, None] * y_token + column[None, :] * y_out,
            mask=live[:, None] & (column[None, :] < d_out),
            other=0.0,
        ).to(out.dtype.element_ty)
        total = tl.dot(h_tile, y_tile, total, input_precision=PRECISION)
    target = out + (adapter.to(tl.int64) * rank + line[:, None]) * d_out + column[None, :]
    mask = (line[:, None] < rank) & (column[None, :] < d_out)
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class TokenBlocks:
    """The tokens of each adapter, for batches with so many tokens in each row.

    Tokens are counted in the order of `rows`.
    """

    rows: Int32[Tensor, " adapted"]
    """The rows that have an adapter, adapter after adapter."""
    bounds: Int32[Tensor, " ends"]
    """Slot i has the tokens from bounds[i] to before bounds[i + 1]."""
    adapters: Int32[Tensor, " blocks"]
    """The adapter of each block."""
    starts: Int32[Tensor, " blocks"]
    """The first token of each block."""
    stops: Int32[Tensor, " blocks"]
    """The token after each block's last."""
    length: int
    """The most tokens that a block has, a power of two."""


@functools.lru_cache(maxsize=64)
def token_blocks(
    grouping: Grouping, *, per_row: int, adapters: int, device: torch.device
) -> TokenBlocks:
    """The blocks of a batch; cached, since every layer has the same.

    Args:
        grouping: of the rows.
        per_row: tokens of each row.
        adapters: how many are stacked.
        device: where the batch is.
    """
    rows_of: list[list[int]] = [[] for _ in range(adapters)]
    for row, adapter in enumerate(grouping.index_of_row):
        if adapter >= 0:
            rows_of[adapter].append(row)
    bounds = [0]
    for rows in rows_of:
        bounds.append(bounds[-1] + len(rows) * per_row)
    length = _tile(max(len(rows) for rows in rows_of) * per_row, 64)
    found = [
        (adapter, start, min(start + length, bounds[adapter + 1]))
        for adapter in range(adapters)
        for start in range(bounds[adapter], bounds[adapter + 1], length)
    ]

    def table(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return TokenBlocks(
        rows=table([row for rows in rows_of for row in rows]),
        bounds=table(bounds),
        adapters=table([adapter for adapter, _, _ in found]),
        starts=table([start for _, start, _ in found]),
        stops=table([stop for _, _, stop in found]),
        length=length,
    )


def _tile(size: int, most: int) -> int:
    """The power of two that covers a size; a GPU's matrix units want 16 or more."""
    return max(16, min(most, triton.next_power_of_2(size)))


def _precision(dtype: torch.dtype) -> str:
    """The precision of a matmul of float32, which is that of torch's own."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


@dataclass(frozen=True)
class _Batch:
    """A grouping, and the tokens of each row in a layer's input."""

    grouping: Grouping
    per_row: int

    def multiply(
        self,
        x: Float[Tensor, "tokens d_in"],
        w: Float[Tensor, "adapters d_in d_out"],
        *,
        dtype: torch.dtype | None = None,
        onto: Float[Tensor, "tokens d_out"] | None = None,
    ) -> Float[Tensor, "tokens d_out"]:
        """x[token] · w[adapter of token], 0 without an adapter; or that added to a tensor."""
        out = onto
        if out is None:
            new = torch.zeros if self.grouping.adapted is not None else torch.empty
            out = new(x.shape[0], w.shape[2], dtype=dtype, device=x.device)
        found = self._token_blocks(w.shape[0], x.device)
        if found.adapters.numel() == 0:
            return out

        def grid(chosen: Mapping[str, Any]) -> tuple[int, int]:
            return found.adapters.numel(), triton.cdiv(w.shape[2], chosen["BLOCK_OUT"])

        with torch.cuda.device_of(x):
            _rows_times_matrix[grid](
                x,
                w,
                out,
                found.rows,
                found.adapters,
                found.starts,
                found.stops,
                self.per_row,
                *w.shape[1:],
                *x.stride(),
                *w.stride(),
                *out.stride(),
                ADD=onto is not None,
                PRECISION=_precision(w.dtype),
                BLOCK_TOKENS=found.length,
                # A short tile of tokens leaves room for a long one of features.
                BLOCK_IN=_tile(w.shape[1], 128 if found.length == 16 else 32),
            )
        return out

    def outer(
        self, h: Float[Tensor, "tokens rank"], y: Float[Tensor, "tokens d"], like: Tensor
    ) -> Float[Tensor, "adapters rank d"]:
        """Σ h[token]ᵀ · y[token] for each adapter of the stack that this is the gradient of."""
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        found = self._token_blocks(like.shape[0], h.device)
        if found.adapters.numel() == 0:
            return out.zero_()
        block_rank = _tile(h.shape[1], 64)

        def grid(chosen: Mapping[str, Any]) -> tuple[int, int, int]:
            return (
                like.shape[0],
                triton.cdiv(h.shape[1], block_rank),
                triton.cdiv(y.shape[1], chosen["BLOCK_OUT"]),
            )

        with torch.cuda.device_of(h):
            _outer_products[grid](
                h,
                y,
                out,
                found.rows,
                found.bounds,
                self.per_row,
                h.shape[1],
                y.shape[1],
                *h.stride(),
                *y.stride(),
                PRECISION=_precision(like.dtype),
                BLOCK_TOKENS=32,
                BLOCK_RANK=block_rank,
            )
        return out

    def _token_blocks(self, adapters: int, device: torch.device) -> TokenBlocks:
        return token_blocks(self.grouping, per_row=self.per_row, adapters=adapters, device=device)


class _DownProject(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, batch: _Batch) -> Tensor:
        ctx.save_for_backward(x, a)
        ctx.batch = batch
        return batch.multiply(x, a.mT, dtype=a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        for_x, for_a, _ = ctx.needs_input_grad
        return (
            ctx.batch.multiply(grad, a, dtype=x.dtype) if for_x else None,
            ctx.batch.outer(grad, x, a) if for_a else None,
            None,
        )


class _UpProjectOnto(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, h: Tensor, b: Tensor, batch: _Batch) -> Tensor:
        ctx.save_for_backward(h, b)
        ctx.batch = batch
        ctx.mark_dirty(output)
        batch.multiply(h, b, onto=output.view(-1, output.shape[-1]))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, b = ctx.saved_tensors
        _, for_h, for_b, _ = ctx.needs_input_grad
        tokens = grad.reshape(-1, grad.shape[-1])
        return (
            grad,
            ctx.batch.multiply(tokens, b.mT, dtype=h.dtype) if for_h else None,
            ctx.batch.outer(h, tokens, b) if for_b else None,
            None,
        )


def down_project(
    x: Float[Tensor, "tokens *more d_in"],
    a: Float[Tensor, "adapters rank d_in"],
    grouping: Grouping,
) -> Float[Tensor, "all_tokens rank"]:
    """h = A·x of each token's own A, in the dtype of A; zero for tokens without an adapter.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    batch = _Batch(grouping, grouping.per_row(x))
    return _DownProject.apply(x.reshape(-1, x.shape[-1]), a, batch)


def up_project_onto(
    output: Float[Tensor, "tokens *more d_out"],
    h: Float[Tensor, "all_tokens rank"],
    b: Float[Tensor, "adapters rank d_out"],
    grouping: Grouping,
) -> Float[Tensor, "tokens *more d_out"]:
    """Add the update scale·B·h to a layer's output in place, and return the output.

    The sum is rounded once, to the output's dtype. Tokens without an adapter keep every bit.
    """
    return _UpProjectOnto.apply(output, h, b, _Batch(grouping, len(h) // grouping.rows))
