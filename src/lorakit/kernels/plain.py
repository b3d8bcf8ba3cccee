"""LoRA's update scale·B·(A·x) in plain torch, for each kind of layer; B·A is formed only to merge.

All functions compute in the precision of A and B, and return that precision, with one exception:
`working_dtype`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lorakit.kernels.dropout import Dropout


def linear_update(
    x: Float[Tensor, "*rows d_in"],
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    scale: float,
    *,
    dropout: Dropout | None = None,
) -> Float[Tensor, "*rows d_out"]:
    """scale·B·(A·x) (Eq. 3), with elements of x dropped."""
    dtype = working_dtype(x, a, tokens=x.shape[:-1].numel())
    x = x.to(dtype)
    down_project = F.linear(x if dropout is None else dropout.of(x), a.to(dtype))
    if dtype != a.dtype:
        return F.linear(down_project * scale, b.to(dtype))
    # The scale comes last, as in PEFT, so that both round alike: logits of 30 agree in every bit.
    return F.linear(down_project, b) * scale


MANY_TOKENS = 16
"""Tokens that share A and B, from which matmuls in half precision are faster on CPUs."""


def working_dtype(x: Tensor, a: Tensor, *, tokens: int) -> torch.dtype:
    """The precision in which an update is computed: that of A and B, or that of x.

    It is that of x for many tokens of a half-precision base, where nothing is trained: the update
    is rounded to that precision anyway, sums are in float32 either way, and a prefill, which is
    limited by these matmuls, takes half of the time for them.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype if half and tokens >= MANY_TOKENS and not torch.is_grad_enabled() else a.dtype


def embedding_update(
    ids: Int[Tensor, "*rows"],
    a: Float[Tensor, "rank vocabulary"],
    b: Float[Tensor, "d_model rank"],
    scale: float,
    *,
    dropout: float = 0.0,
    padding: int | None = None,
    by_frequency: bool = False,
) -> Float[Tensor, "*rows d_model"]:
    """scale·B·A[:, ids], which is Eq. 3 for one-hot inputs.

    Dropping an element of a one-hot input drops the whole token, so dropout works per token.

    Args:
        ids: of tokens.
        a: the adapter's A.
        b: its B.
        scale: factor on the update.
        dropout: probability by which a token's update is dropped.
        padding: a token whose column of A gets no gradient, as the layer's padding_idx.
        by_frequency: divide a column's gradient by how often its token is there.
    """
    down_project = F.embedding(ids, a.T, padding_idx=padding, scale_grad_by_freq=by_frequency)
    if dropout:
        down_project = down_project * F.dropout(down_project.new_ones((*ids.shape, 1)), dropout)
    return F.linear(down_project, b) * scale


def conv_update(
    convolve: Callable[[Tensor, Tensor, None], Tensor],
    x: Float[Tensor, "batch c_in *space"],
    a: Float[Tensor, "rank c_in_per_group *kernel"],
    b: Float[Tensor, "c_out rank *ones"],
    scale: float,
    groups: int,
) -> Float[Tensor, "batch c_out *out_space"]:
    """scale·B∗(A∗x): A with the base's geometry, B a 1×1 convolution.

    Args:
        convolve: the base layer's own (input, weight, bias) → output, which knows its stride,
            padding and its mode, dilation and groups.
        x: the layer's input.
        a: shared by the groups (docs/design/adapter.md).
        b: one row per output channel.
        scale: the factor on the update.
        groups: the base layer's groups.
    """
    down_project = convolve(x.to(a.dtype), a.repeat(groups, *[1] * (a.dim() - 1)), None)
    pointwise = (F.conv1d, F.conv2d, F.conv3d)[a.dim() - 3]
    return pointwise(down_project, b, groups=groups) * scale


def add_delta(
    weight: Float[Tensor, "d_out *inner"],
    a: Float[Tensor, "rank *inner"],
    b: Float[Tensor, "d_out rank *ones"],
    scale: float,
) -> None:
    """Add ΔW = scale·B·A to a weight in place; this is for merging, never for a forward."""
    matrix = weight if weight.dim() == 2 else weight.view(weight.shape[0], -1)
    matrix.addmm_(b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1), alpha=scale)


ROWS = 1024
"""Rows whose lengths are computed at once: 16 MB of float32 at 4096 columns."""


def row_norms(
    weight: Float[Tensor, "d_out d_in"],
    a: Float[Tensor, "rank d_in"],
    b: Float[Tensor, "d_out rank"],
    scale: float,
) -> Float[Tensor, " d_out"]:
    """‖W + scale·B·A‖ of each row, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    pieces = zip(weight.split(ROWS), b.split(ROWS), strict=True)
    return torch.cat([norms(torch.addmm(w.to(dtype), own, a, alpha=scale)) for w, own in pieces])


def norms(rows: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " d_out"]:
    """The Euclidean norm of each row; where that is zero, the least that can divide."""
    return rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
