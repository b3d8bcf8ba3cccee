"""A count of a computation without values: the memory that lives at once, FLOPs, bytes moved.

On the meta device every operation is carried out in all but its numbers. So the code of a real
training step runs, and what it would allocate, keep and free is counted operation by operation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lorakit.kernels.stand_in import kind_of_device
from lorakit.upstream.private_names import (
    CPU_ATTENTION_GRADIENT,
    FUSED_ATTENTIONS,
    GROUPED_MATMUL,
    TorchDispatchMode,
    arguments_of,
    cpu_attention,
    storage_number,
    tree_leaves,
)

KINDS = ("weights", "adapter", "optimizer", "gradients", "activations", "logits", "temporary")
"""What memory is held for. Activations are what a forward pass leaves; temporary is the rest."""


class StepCounter(TorchDispatchMode):
    """Counts what operations on the meta device would allocate and compute.

    Memory counts from its allocation until nothing refers to it any more.
    """

    def __init__(self, *, vocabulary: int | None = None) -> None:
        """Count; matrices as wide as the vocabulary are logits."""
        super().__init__()
        self.kind = "activations"
        """What new memory is held for."""
        self.live: Counter[str] = Counter()
        self.at_peak: Mapping[str, int] = {}
        """The memory by kind when there was most of it."""
        self.peak_bytes = 0
        self.flops = 0
        self.moved_bytes = 0
        """Read and written by operations other than matmuls and attention."""
        self.operations = 0
        self._vocabulary = vocabulary
        self._total = 0
        self._known: dict[int, tuple[str, int]] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the memory of tensors that are there already, or say what it is held for."""
        for tensor in tensors:
            self._forget(storage_number(tensor))
            self._add(tensor, kind)

    def begin(self) -> None:
        """Count the peak, FLOPs and bytes anew from here on."""
        self.peak_bytes, self.at_peak = self._total, dict(self.live)
        self.flops, self.moved_bytes, self.operations = 0, 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        # Without values torch makes the result in bfloat16 alone, and of some sizes.
        grouped = func is GROUPED_MATMUL and args[0].is_meta
        result = _grouped(*args, **options) if grouped else func(*args, **options)
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        made = [each for each in leaves if isinstance(each, Tensor) and each.is_meta]
        fresh = [each for each in made if storage_number(each) not in self._known]
        for tensor in fresh:
            self._add(tensor, self._kind_of(tensor))
        self._count(func, args, options, result, bool(fresh))
        return result

    def _count(
        self, func: Any, args: tuple[Any, ...], options: Mapping[str, Any], result: Any, fresh: bool
    ) -> None:
        flops = _flops(func, args, options, result)
        self.flops += flops
        if flops or not (fresh or _writes(func)):
            return
        self.operations += 1
        tensors = [each for each in tree_leaves((args, result)) if isinstance(each, Tensor)]
        self.moved_bytes += sum(each.nbytes for each in tensors if each.is_meta)

    def _kind_of(self, tensor: Tensor) -> str:
        is_wide = self._vocabulary is not None and tensor.dim() == 2
        return "logits" if is_wide and tensor.shape[-1] == self._vocabulary else self.kind

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        number, size = storage_number(tensor), storage.nbytes()
        self._known[number] = kind, size
        self._references[number] = weakref.ref(storage, lambda _: self._forget(number))
        self.live[kind] += size
        self._total += size
        if self._total > self.peak_bytes:
            self.peak_bytes, self.at_peak = self._total, dict(self.live)

    def _forget(self, number: int) -> None:
        if number not in self._known:
            return
        kind, size = self._known.pop(number)
        self._references.pop(number)
        self.live[kind] -= size
        self._total -= size


@cache
def _writes(func: Any) -> bool:
    """Whether an operation writes into one of its arguments."""
    aliases = (each.alias_info for each in arguments_of(func))
    return any(each is not None and each.is_write for each in aliases)


def _grouped(
    first: Tensor,
    second: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of a grouped matmul, without values.

    Args:
        first: (rows, d), or (groups, rows, d).
        second: (groups, d, n), or (d, n), whose groups are parts of d or of n.
        offs: where each group ends; None: both have a dimension of groups.
        bias: added to the result.
        out_dtype: the precision of the result.
    """
    rows, width = first.shape[-2], second.shape[-1]
    groups = first.dim() == second.dim()
    count = first.shape[0] if offs is None else len(offs)
    shape = (count, rows, width) if groups else (rows, width)
    return first.new_empty(shape, dtype=out_dtype or first.dtype)


def _flops(func: Any, args: tuple[Any, ...], options: Mapping[str, Any], result: Any) -> int:
    """The FLOPs of a matmul, a convolution or attention: two for each product that is added."""
    if func in FUSED_ATTENTIONS:
        return int(sdpa_flop_count(*(each.shape for each in args[:3])))
    if func is CPU_ATTENTION_GRADIENT:
        return int(sdpa_backward_flop_count(*(each.shape for each in args[:4])))
    if func is GROUPED_MATMUL:
        # Each row, or each entry of the inner dimension, is in one group.
        first, second = args[0].shape, args[1].shape
        groups = first[0] if len(first) == len(second) == 3 else 1
        return int(2 * groups * first[-2] * first[-1] * second[-1])
    formula = flop_registry.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **options, out_val=result))


@contextmanager
def fused_attention(*, causal: bool | None = None) -> Iterator[None]:
    """Let torch's attention be one kernel on the meta device inside a block, as on the one meant.

    By itself it would there be matmuls, which keep the probabilities. Other devices' is untouched.

    Args:
        causal: what masks come down to where no row is padded; None: they are given.
    """
    own = F.scaled_dot_product_attention

    def attend(q: Tensor, *args: Any, **options: Any) -> Tensor:
        if not q.is_meta or not _is_fused(q, **options):
            return own(q, *args, **options)
        if causal is not None:
            options = {**options, "attn_mask": None, "is_causal": causal}
            args = args[:2]
        return _attention(q, *args, **options)

    # Not by a mode of torch, which is off in the recomputations of a backward pass.
    vars(F)[own.__name__] = attend
    try:
        yield
    finally:
        vars(F)[own.__name__] = own


def _is_fused(q: Tensor, *, dropout_p: float = 0.0, **_: Any) -> bool:
    """Whether the device meant has one kernel for it: a CPU has none with dropout."""
    return not dropout_p or kind_of_device(q) == "cuda"


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and kind_of_device(q) == "cpu":
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(q.dtype)
    return cpu_attention(q, k, v, mask=attn_mask, causal=is_causal, scale=scale)
