"""Linear layers of few rows, computed in the way that is fastest on this processor.

A decode step multiplies each weight by a few rows, where libraries are made for many. x·Wᵀ, W·xᵀ
and oneDNN's linear compute the same, and take times that differ by up to three; which of them is
the fastest depends on processor, rows and shape. So they are timed, once in a process for each
kind, on the model's own weights. Float32 on a CPU, without gradients: elsewhere nothing changes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorakit.kernels.choice import fast
from lorakit.upstream.private_names import (
    compiled_call,
    is_compiled_wrapper,
    onednn_linear,
    own_parameters,
)

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Computes x·Wᵀ + b from x (rows, d_in), W (d_out, d_in) and b (d_out)."""

ROWS = (1, 4, 16, 64)
"""Of the inputs that are timed; another number goes by the greatest of these below it."""
MOST_ROWS = 127
"""From here on torch's own way is as fast."""
LEAST_VALUES = 1 << 16
"""Of a weight: smaller ones take no time worth choosing."""
TIMED_VALUES = 1 << 23
"""Of the weights of one shape that are timed: more than caches hold, so that they come from memory
as in a step. Of a larger weight its first rows are timed."""
PASSES = 3
BETTER = 0.9
"""The share of torch's own time that others take at most to be chosen."""


def turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same as W·xᵀ, whose result is read in the other direction."""
    out = torch.mm(weight, x.t()).t()
    return out if bias is None else out + bias


WAYS: Mapping[str, Way] = {"own": F.linear, "turned": turned, "onednn": onednn_linear}

_known: dict[tuple[int, int, int, int], Mapping[str, float]] = {}
"""Seconds of each way by rows, d_out, d_in and torch's number of threads."""
_of_models: MutableMapping[nn.Module, dict[tuple[int, int], Mapping[tuple[int, int], str]]] = (
    WeakKeyDictionary()
)
"""What was chosen for the shapes of a model, by rows and threads."""


def few_rows(model: nn.Module, rows: int) -> AbstractContextManager[Any]:
    """A block in which this thread's linear layers of few rows are computed in the fastest way.

    The first block of a model times its shapes, which takes about a second for a large one.

    Args:
        model: what is called in the block.
        rows: of the inputs that its layers will have in it; others are computed as ever.
    """
    is_here = torch.backends.mkldnn.is_available()
    if not (fast() and is_here and 0 < rows <= MOST_ROWS):
        return nullcontext()
    if is_compiled_wrapper(model) or compiled_call(model) is not None:
        return nullcontext()
    of_model = _of_models.setdefault(model, {})
    key = _timed_rows(rows), torch.get_num_threads()
    if key not in of_model:
        of_model[key] = _chosen(model, key[0])
    return FewRows(rows, of_model[key]) if of_model[key] else nullcontext()


class FewRows(TorchFunctionMode):
    """Computes `F.linear` in the way that was chosen for its shape.

    Args:
        rows: of the inputs; others are torch's.
        chosen: the name of a way by d_out and d_in; others are torch's.
    """

    def __init__(self, rows: int, chosen: Mapping[tuple[int, int], str]) -> None:
        super().__init__()
        self._rows, self._chosen = rows, chosen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs:
            return self._linear(*args)
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        way = self._way(x, weight)
        if way is None:
            return F.linear(x, weight, bias)
        out = way(x.reshape(self._rows, -1), weight, bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _way(self, x: Tensor, weight: Tensor) -> Way | None:
        """How a layer is computed; None: by torch."""
        if x.numel() != self._rows * x.shape[-1] or torch.is_grad_enabled():
            return None
        name = self._chosen.get((weight.shape[0], weight.shape[-1]))
        # What is traced has no values, and what it becomes is for the compiler to say.
        is_other = name is None or (name == "onednn" and type(x) is not Tensor)
        # A model may have been moved to a GPU after its shapes were timed.
        are_timed = x.is_cpu and x.dtype == weight.dtype == torch.float32
        return None if is_other or not are_timed else WAYS[str(name)]


def _timed_rows(rows: int) -> int:
    return max(each for each in ROWS if each <= rows)


def _chosen(model: nn.Module, rows: int) -> Mapping[tuple[int, int], str]:
    """The ways for a model's shapes that are not torch's; none where they would save too little."""
    found, taken, saved = {}, 0.0, 0.0
    for shape, weights in _weights_by_shape(model).items():
        times = _times(rows, shape, weights)
        best = min(times, key=lambda name: times[name])
        taken += len(weights) * times["own"]
        if times[best] < BETTER * times["own"]:
            found[shape] = best
            saved += len(weights) * (times["own"] - times[best])
    # Every function of torch becomes a little slower in the block.
    return found if saved > (1 - BETTER) * taken else {}


def _weights_by_shape(model: nn.Module) -> Mapping[tuple[int, int], Sequence[Tensor]]:
    found: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for module in model.modules():
        # Not its attribute: where a model reads it without a call, that has the adapter in it.
        weight = own_parameters(module).get("weight") if isinstance(module, nn.Linear) else None
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.numel() < LEAST_VALUES:
            continue
        if weight.dtype == torch.float32 and weight.device.type == "cpu":
            found[weight.shape[0], weight.shape[1]].append(weight.detach())
    return found


def _times(rows: int, shape: tuple[int, int], weights: Sequence[Tensor]) -> Mapping[str, float]:
    """The seconds that each way takes for so many rows of weights of one shape."""
    key = (rows, *shape, torch.get_num_threads())
    if key not in _known:
        _known[key] = _timed(rows, shape, weights)
    return _known[key]


@torch.inference_mode()
def _timed(rows: int, shape: tuple[int, int], weights: Sequence[Tensor]) -> Mapping[str, float]:
    most = max(1, TIMED_VALUES // shape[1])
    parts = [each[:most] for each in weights[: max(1, TIMED_VALUES // (shape[0] * shape[1]))]]
    x = torch.ones(rows, shape[1])
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(PASSES):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            for part in parts:
                way(x, part, None)
            times[name].append((time.perf_counter() - begun) / len(parts))
    return {name: min(taken) for name, taken in times.items()}
