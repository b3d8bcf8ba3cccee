"""DoRA: each row of W₀ + scale·B·A has a trained magnitude m (Liu et al. 2024, section 4).

    y = m / ‖W₀ + scale·B·A‖ · (W₀ + scale·B·A)·x + bias

The norms in the denominator are constants in the backward pass (section 4.3). With dropout,
elements of x are dropped for B·A·x alone, as in LoRA; PEFT drops them for a part of W₀·x, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorakit.upstream.private_names import write_count


def rescaled(output: Tensor, factor: Tensor, bias: Tensor | None, entries: Tensor | None) -> Tensor:
    """A layer's output with W·x in it multiplied.

    Args:
        output: W·x + bias, (…, d_out).
        factor: one for each entry that changes; where it is 1, the output keeps every bit.
        bias: the layer's own.
        entries: which of the last dimension change, int64; None: all.
    """
    part = output if entries is None else output.index_select(-1, entries)
    if bias is not None and entries is not None:
        bias = bias[entries]
    matmul = part if bias is None else part - bias
    part = part + ((factor - 1) * matmul).to(output.dtype)
    return part if entries is None else output.index_copy(-1, entries, part)


class RowNorms:
    """The norms of a weight's rows, which inference keeps until a tensor behind them changes.

    Computing them reads the whole weight, as often as a model writes a token.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, Sequence[Any], Tensor] | None = None

    def of(self, sources: Sequence[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The norms that a function computes from tensors, kept while these are unchanged."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return compute()
        if any(tensor.is_inference() for tensor in sources):
            # Torch counts no writes to these.
            return compute()
        token = [(tensor.data_ptr(), write_count(tensor), tensor.dtype) for tensor in sources]
        kept = self._kept
        if kept is None or kept[0] != token:
            # While the memory is held, nothing else can lie at its address.
            kept = (token, [tensor.untyped_storage() for tensor in sources], compute())
            self._kept = kept
        return kept[2]

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle, whose tensors lie elsewhere."""
        return {"_kept": None}
