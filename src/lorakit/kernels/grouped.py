"""The update of a mixed batch, where each row uses one of many adapters or none (Eq. 3 per row).

The weights of all adapters are stacked: `a` (adapters, rank, d_in) and `b` (adapters, rank, d_out).
B is stored transposed, because a batched matmul with it is two to three times faster on CPUs, and
the scale is folded into it. Adapters of a smaller rank are padded with zeros. Both have the same
dtype, in which the update is computed.

    grouping = group_rows(index_of_row, device=x.device, dtype=a.dtype)  # once per route
    a, b = gather(a, grouping), gather(b, grouping)                      # once per route
    h = down_project(x, a, grouping)                                     # per input
    output = up_project_onto(output, h, b, grouping)                     # per layer

Layers that share an input share one down-projection: their A's are concatenated along rank, and
each layer takes its own slice of h's last dimension. Autograd differentiates all functions.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.kernels import plain
from lorakit.kernels.grouping import Grouping


def gather(
    stack: Float[Tensor, "adapters *inner"], grouping: Grouping
) -> Float[Tensor, "chosen *inner"]:
    """The weights of each group, for the two projections; the stack itself where that will do.

    The Triton kernels look up the adapter of each row in the stack.
    """
    if grouping.kernels == "triton":
        return stack
    if grouping.index_of_group is None:
        return stack[: grouping.groups]
    return stack.index_select(0, grouping.index_of_group)


def in_order(x: Tensor, grouping: Grouping) -> Tensor:
    """An input (rows·k, …, d) in the order of h, which only the grouping knows.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    per_row = grouping.per_row(x)
    if grouping.kernels == "triton":
        return x.reshape(-1, x.shape[-1])
    if grouping.order is not None:
        rows = x.reshape(grouping.rows, per_row, x.shape[-1])
        x = rows.index_select(0, grouping.order)
    return x.reshape(grouping.groups, grouping.rows_per_group * per_row, x.shape[-1])


def down_project(
    x: Float[Tensor, "tokens *more d_in"],
    a: Float[Tensor, "chosen rank d_in"],
    grouping: Grouping,
) -> Float[Tensor, "*ordered rank"]:
    """h = A·x of each row's own A, in the dtype of A (see also `plain.working_dtype`).

    Args:
        x: (rows·k, …, d_in) for any k; what belongs to one row (tokens, beams) is contiguous.
        a: what `gather` returns.
        grouping: of the batch's rows.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    if grouping.kernels == "triton":
        from lorakit.kernels import segments_triton

        return segments_triton.down_project(x, a, grouping)
    ordered = in_order(x, grouping)
    dtype = plain.working_dtype(x, a, tokens=ordered.shape[1])
    return torch.bmm(ordered.to(dtype), a.to(dtype).mT)


def up_project(
    h: Float[Tensor, "*ordered rank"],
    b: Float[Tensor, "chosen rank d_out"],
    grouping: Grouping,
) -> Float[Tensor, "adapted per_row d_out"]:
    """The update scale·B·h of the rows that have an adapter, in ascending order.

    Args:
        h: from `down_project` or `in_order`, or a slice of its last dimension.
        b: what `gather` returns.
        grouping: of the batch's rows.
    """
    if grouping.kernels == "triton":
        zeros = h.new_zeros(grouping.rows, len(h) // grouping.rows, b.shape[-1])
        update = up_project_onto(zeros, h, b, grouping)
        return update if grouping.adapted is None else update[grouping.adapted]
    places = grouping.groups * grouping.rows_per_group
    per_row = h.shape[1] // grouping.rows_per_group
    update = torch.bmm(h, b.to(h.dtype)).view(places, per_row, b.shape[-1])
    return update if grouping.back is None else update.index_select(0, grouping.back)


def up_project_onto(
    output: Float[Tensor, "tokens *more d_out"],
    h: Float[Tensor, "*ordered rank"],
    b: Float[Tensor, "chosen rank d_out"],
    grouping: Grouping,
) -> Float[Tensor, "tokens *more d_out"]:
    """Add the update to a layer's output in place, and return the output.

    Rows without an adapter keep every bit.

    Args:
        output: the layer's own result, or some entries of its last dimension.
        h: from `down_project` or `in_order`, or a slice of its last dimension.
        b: what `gather` returns.
        grouping: of the batch's rows.
    """
    if grouping.kernels == "triton":
        from lorakit.kernels import segments_triton

        return segments_triton.up_project_onto(output, h, b, grouping)
    b = b.to(h.dtype)
    if _is_one_matmul(output, h, b, grouping):
        output.view(grouping.groups, -1, b.shape[-1]).baddbmm_(h, b)
        return output
    return add_update(output, up_project(h, b, grouping), grouping)


def _is_one_matmul(output: Tensor, h: Tensor, b: Tensor, grouping: Grouping) -> bool:
    """Whether matmul and sum can be one call, which halves the time of a decoding step."""
    # Autograd would copy the gradient of the view that is needed for it.
    return (
        grouping.order is None
        and output.dtype == h.dtype == b.dtype
        and output.is_contiguous()
        and not torch.is_grad_enabled()
    )


def add_update(
    output: Float[Tensor, "tokens *more d_out"],
    update: Float[Tensor, "adapted per_row d_out"],
    grouping: Grouping,
) -> Float[Tensor, "tokens *more d_out"]:
    """Add what `up_project` returns to a layer's output in place, and return the output.

    The update is rounded to the output's dtype first, as in a batch with one adapter. Rows without
    an adapter keep every bit.
    """
    # A sum of two dtypes is up to sixteen times slower on CPUs: both are converted into new memory.
    update = update.to(output.dtype)
    if grouping.adapted is None:
        return output.add_(update.view(output.shape))
    if len(output) == grouping.rows:
        rows = output
    else:
        rows = output.view(grouping.rows, -1, output.shape[-1])
    rows.index_add_(0, grouping.adapted, update.view(len(update), *rows.shape[1:]))
    return output
