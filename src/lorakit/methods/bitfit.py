"""BitFit: the bias vectors alone are trained (Ben Zaken et al. 2021; LoRA paper, section 5.1)."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lorakit.errors import TargetError
from lorakit.method_config import BitFitConfig
from lorakit.methods.claims import Claims
from lorakit.methods.lora import ConvNd
from lorakit.models.base import base_modules

BIASED = (nn.Linear, nn.LayerNorm, *ConvNd)


def claim(model: nn.Module, config: BitFitConfig) -> Claims:
    """Return what BitFit trains of a model.

    Raises:
        TargetError: the model has no biases.
    """
    return Claims(biases=bias_paths(model))


def bias_paths(model: nn.Module, *, only: Collection[str] | None = None) -> tuple[str, ...]:
    """Return the paths of the modules whose bias can be trained.

    Args:
        model: the base.
        only: paths to look at; None: all.

    Raises:
        TargetError: there is none, or one of another kind than is known.
    """
    named = {
        path: module
        for path, module in base_modules(model)
        if isinstance(getattr(module, "bias", None), nn.Parameter)
        and (only is None or path in only)
    }
    odd = [f"{path} ({type(m).__name__})" for path, m in named.items() if not adds_bias(m)]
    if odd:
        raise TargetError.listing("some biases are of layers where they can't be trained", odd)
    if not named:
        raise TargetError(
            "biases are to be trained, but none of the layers has one: use bias='none'"
        )
    return tuple(named)


def adds_bias(module: nn.Module) -> bool:
    """Tell whether a module's output is its product plus its bias."""
    return isinstance(module, BIASED) or type(module).__name__ in ("Conv1D", "AdaptedConv1D")
