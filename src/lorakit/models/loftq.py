"""LoftQ as PEFT does it: a base in whose adapted layers is what quantising leaves of the weights.

LoftQ (Li et al. 2023, algorithm 1) takes turns: W' is what quantising leaves of W − L·R, and L·R,
which is 0 at first, the nearest matrix of the adapter's rank to W − W'. The adapter starts at L·R,
and PEFT puts W', in floats, in the place of W. What that takes from W has full rank, so no adapter
of W alone can hold it: the base itself has to be changed, and says by a mark that it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import ModelError
from lorakit.models.base import base_modules
from lorakit.models.identity import identify
from lorakit.models.quantized import check_library, original_identity, quantized_within
from lorakit.models.roles import task_heads
from lorakit.upstream.private_names import own_parameters
from lorakit.upstream.quiet_library import quiet_library

BITS = (4, 8)
"""What weights can be quantised to: 4 is nf4 in blocks of 64 weights, 8 is int8 by rows."""


@dataclass(frozen=True, kw_only=True)
class LoftQ:
    """How LoftQ changes the weights of the adapted layers."""

    bits: Literal[4, 8]
    """One of `BITS`."""
    iterations: Annotated[int, Field(ge=1)]
    """How often a weight is quantised; once: W' does not depend on the rank."""

    def __str__(self) -> str:
        """In words, such as "4 bits, 1 iteration"."""
        return f"{self.bits} bits, {self.iterations} iteration{'s' * (self.iterations > 1)}"

    def forms(self, ranks: Mapping[str, int]) -> dict[str, str]:
        """All that the weight of each layer is made by, in words that are equal where W' is.

        Args:
            ranks: of the adapter's updates, by the path of the layer.
        """
        once = self.iterations == 1
        return {path: str(self) if once else f"{self}, rank {r}" for path, r in ranks.items()}


def put_loftq(model: nn.Module, how: LoftQ, ranks: Mapping[str, int]) -> None:
    """Change the weights of some layers as LoftQ does, in place; W itself is not kept.

    Each is quantised in float32 and comes back in the precision that it had, in the layout that it
    is stored in, as in PEFT. What the base is told by stays that of the base as it was.

    Args:
        model: a float base without adapters. One that is changed so already is left alone.
        how: bits and iterations.
        ranks: of the updates, by the path of the layer.

    Raises:
        ModelError: adapters are attached, the base is quantised or was changed otherwise before,
            or a layer is not there or none of those that PEFT's LoftQ is for; all are listed.
        MissingExtraError: bitsandbytes is not installed.
    """
    check_library("LoftQ, which quantises the base's layers,")
    if loftq_of(model) == how.forms(ranks):
        return
    layers = dict(base_modules(model))
    problems = list(_model_problems(model)) or list(_layer_problems(layers, ranks))
    if problems:
        name = type(model).__name__
        raise ModelError.listing(f"LoftQ ({how}) can't change the layers of {name}", problems)
    if original_identity(model) is None:
        identity = identify(model, skip=task_heads(model))
        model._lorakit_original = identity  # type: ignore[assignment]
    # It grows layer by layer, so that a base that was left half-changed fits no adapter.
    mark: dict[str, str] = {}
    model._lorakit_loftq = mark  # type: ignore[assignment]
    for path, form in how.forms(ranks).items():
        weight: Any = layers[path].weight
        weight.data.copy_(_quantised(weight.detach(), how, ranks[path]))
        mark[path] = form


def loftq_of(model: nn.Module) -> Mapping[str, str]:
    """What made the weight of each layer that LoftQ has changed, by path (`LoftQ.forms`)."""
    found: Mapping[str, str] = getattr(model, "_lorakit_loftq", {})
    return found


def drop_loftq_mark(model: nn.Module) -> None:
    """Have a base count as it is now, where LoftQ changed it and then an adapter was merged."""
    if loftq_of(model):
        del model._lorakit_loftq, model._lorakit_original


@torch.no_grad()
def _quantised(weight: Tensor, how: LoftQ, rank: int) -> Tensor:
    """W' of a weight, in float32."""
    with quiet_library():
        from lorakit.models.quantized_layers import after_quantising
    exact = weight.float()
    left = after_quantising(exact, how.bits)
    for _ in range(how.iterations - 1):
        u, s, v = torch.linalg.svd(exact - left, full_matrices=False)
        root = s[:rank].sqrt()
        left = after_quantising(exact - (u[:, :rank] * root) @ (root[:, None] * v[:rank]), how.bits)
    return left


def _model_problems(model: nn.Module) -> Iterator[str]:
    if hasattr(model, "_lorakit"):
        yield "adapters are attached: detach them first"
    if loftq_of(model):
        yield "it was changed for another adapter already: load the base anew"
    if quantized_within(model) is not None:
        yield "its weights are quantised, and LoftQ quantises float ones: load it without quantize"


def _layer_problems(layers: Mapping[str, nn.Module], ranks: Mapping[str, int]) -> Iterator[str]:
    holders: dict[int, str] = {}
    for path in ranks:
        layer = layers.get(path)
        if layer is None:
            yield f"{path}  is not a module of this model"
            continue
        if not isinstance(layer, nn.Linear | Conv1D):
            yield f"{path}  is a {type(layer).__name__}, and PEFT's LoftQ is for Linear and Conv1D"
            continue
        weight = own_parameters(layer).get("weight")
        if weight is None or weight.is_meta:
            yield f"{path}  its weight is not in memory, or computed from others"
            continue
        first = holders.setdefault(id(weight), path)
        if first != path:
            yield f"{path}  has the weight of {first}, which would be quantised twice"
