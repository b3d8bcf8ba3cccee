"""The update of a mixed batch, where each row uses one of many adapters or none (Eq. 3 per row).

The weights of all slots are stacked: `a` (slots, rank, d_in) and `b` (slots, rank, d_out). B is
stored transposed, because a batched product over it is two to three times faster on CPUs, and the
scale is folded into it. Slots of a smaller rank are padded with zeros. Both have the same dtype, in
which the update is computed.

    arrangement = arrange(slot_of_row, device=x.device, dtype=a.dtype)  # once per route
    a, b = gather(a, arrangement), gather(b, arrangement)               # once per route
    h = narrow(x, a, arrangement)                                       # per input
    output = widen_onto(output, h, b, arrangement)                      # per layer

Layers that share an input share one `narrow`: their A's are concatenated along rank, and each layer
takes its own slice of h's last dimension. All functions can be differentiated by autograd.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lorakit.kernels import plain
from lorakit.kernels.grouping import Grouping


def gather(
    stack: Float[Tensor, "slots *inner"], grouping: Grouping
) -> Float[Tensor, "chosen *inner"]:
    """The weights as `narrow` and `widen` want them: a copy per chunk, or the stack itself.

    The Triton kernels look up each row's slot, so they take the stack.
    """
    if grouping.kernels == "triton":
        return stack
    if grouping.chunk_slot is None:
        return stack[: grouping.chunks]
    return stack.index_select(0, grouping.chunk_slot)


def in_order(x: Tensor, grouping: Grouping) -> Tensor:
    """An input (rows·k, …, d) in the order of h, which is private to the arrangement.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    per_row = grouping.per_row(x)
    if grouping.kernels == "triton":
        return x.reshape(-1, x.shape[-1])
    if grouping.order is not None:
        rows = x.reshape(grouping.rows, per_row, x.shape[-1])
        x = rows.index_select(0, grouping.order)
    return x.reshape(grouping.chunks, grouping.rows_per_chunk * per_row, x.shape[-1])


def down_project(
    x: Float[Tensor, "tokens *more d_in"],
    a: Float[Tensor, "chosen rank d_in"],
    grouping: Grouping,
) -> Float[Tensor, "*ordered rank"]:
    """Return h = A·x of each row's own A, in the dtype of A (see also `plain.working_dtype`).

    Args:
        x: (rows·k, …, d_in) for any k; what belongs to one row (tokens, beams) is contiguous.
        a: gathered.
        arrangement: of the rows.

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
    """The update scale·B·h of the rows that have a slot, in ascending order.

    Args:
        h: from `narrow` or `in_order`, or a slice of its last dimension.
        b: gathered.
        arrangement: of the rows.
    """
    if grouping.kernels == "triton":
        zeros = h.new_zeros(grouping.rows, len(h) // grouping.rows, b.shape[-1])
        update = up_project_onto(zeros, h, b, grouping)
        return update if grouping.adapted is None else update[grouping.adapted]
    places = grouping.chunks * grouping.rows_per_chunk
    per_row = h.shape[1] // grouping.rows_per_chunk
    update = torch.bmm(h, b.to(h.dtype)).view(places, per_row, b.shape[-1])
    return update if grouping.back is None else update.index_select(0, grouping.back)


def up_project_onto(
    output: Float[Tensor, "tokens *more d_out"],
    h: Float[Tensor, "*ordered rank"],
    b: Float[Tensor, "chosen rank d_out"],
    grouping: Grouping,
) -> Float[Tensor, "tokens *more d_out"]:
    """Add the update to a layer's output in place, and return the output.

    Rows without a slot keep every bit.

    Args:
        output: the layer's own result, or some entries of its last dimension.
        h: from `narrow` or `in_order`, or a slice of its last dimension.
        b: gathered.
        arrangement: of the rows.
    """
    if grouping.kernels == "triton":
        from lorakit.kernels import segments_triton

        return segments_triton.up_project_onto(output, h, b, grouping)
    b = b.to(h.dtype)
    if _is_one_product(output, h, b, grouping):
        output.view(grouping.chunks, -1, b.shape[-1]).baddbmm_(h, b)
        return output
    return add_update(output, up_project(h, b, grouping), grouping)


def _is_one_product(output: Tensor, h: Tensor, b: Tensor, grouping: Grouping) -> bool:
    """Whether product and sum can be one call, which halves the time of a decoding step."""
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
    """Add what `widen` returns to a layer's output in place, and return the output.

    The update is rounded to the output's dtype first, as in a batch with one adapter. Rows without
    a slot keep every bit.
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


def grouped_update(
    x: Float[Tensor, "tokens *more d_in"],
    a: Float[Tensor, "slots rank d_in"],
    b: Float[Tensor, "slots rank d_out"],
    grouping: Grouping,
) -> Float[Tensor, "adapted per_row d_out"]:
    """Return scale·B·(A·x) of the rows that have a slot, from the stacks of all slots.

    Raises:
        RouteError: the batch has another number of rows than the route.
    """
    h = down_project(x, gather(a, grouping), grouping)
    return up_project(h, gather(b, grouping), grouping)
