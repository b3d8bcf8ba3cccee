"""The logit transform of a model: the scale or soft cap that it applies to its head's output.

Gemma caps its logits, Cohere and Granite scale them. A loss that computes logits from the head's
weight, without calling the model's code, must apply the same transform. A model's config names
candidates; a probe, one forward pass with a known output of the head, decides between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lorakit.kernels.logit_transform import IDENTITY, LogitTransform
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.attention import attention_within, takes_attention_functions
from lorakit.models.base import in_eval_mode
from lorakit.models.shape import is_encoder_decoder

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
# Granite divides by what HyperCLOVA X multiplies with, under one name; the probe decides.
_DIVISORS = ("logits_scaling",)

_FOUND: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


def logit_transform(base: nn.Module, head: nn.Module, *, rows: int) -> LogitTransform | None:
    """The transform that a language model applies to its head's output; None: none known here.

    It is probed once for each model and then remembered.

    Args:
        base: the model, without wrappers.
        head: its output head.
        rows: rows of the probe's batch; a route in use fixes how many a batch must have.
    """
    if next(base.parameters()).is_meta:
        # Without values nothing can be probed, and what is computed takes as much memory.
        return IDENTITY
    if base not in _FOUND:
        _FOUND[base] = _probed(base, head, rows)
    return _FOUND[base]


def _probed(base: nn.Module, head: nn.Module, rows: int) -> LogitTransform | None:
    outputs, logits = _probe(base, head, rows)
    if len(outputs) != 1:
        return None
    if torch.equal(logits.to(outputs[0]), outputs[0]):
        return IDENTITY
    return next((each for each in _candidates(base) if _explains(each, outputs[0], logits)), None)


def _candidates(base: nn.Module) -> Iterator[LogitTransform]:
    """The transforms that the numbers in a model's config can mean."""
    config: Any = base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, int | float) and v]

    scales = [1.0, *numbers(_FACTORS), *(1 / number for number in numbers(_DIVISORS))]
    for scale, cap in product(scales, [None, *numbers(_CAPS)]):
        transform = LogitTransform(scale=scale, cap=cap)
        if not transform.is_none:
            yield transform


def _explains(transform: LogitTransform, output: Tensor, logits: Tensor) -> bool:
    """Whether a transform turns the head's output into the model's logits, up to rounding.

    The model rounds up to three times to its own precision, half a unit each; both sides round to
    that of the transform, in which devices compute tanh to a few units.
    """
    found = output.to(torch.promote_types(output.dtype, torch.float32), copy=True)
    transform.apply_(found)
    units = 2 * torch.finfo(output.dtype).eps + 8 * torch.finfo(found.dtype).eps
    return torch.allclose(found, logits.to(found), rtol=units, atol=0)


@torch.no_grad()
def _probe(base: nn.Module, head: nn.Module, rows: int) -> tuple[list[Tensor], Tensor]:
    """One forward pass with numbers of all sizes in place of the head's output.

    Returns:
        What the head's calls were made to return, and the model's logits.
    """
    outputs: list[Tensor] = []

    def replace(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        sizes = torch.logspace(-2, 3, output.numel(), device=output.device)
        sizes[::2] *= -1
        outputs.append(sizes.to(output.dtype).view(output.shape))
        return outputs[-1].clone()

    ids = torch.zeros(rows, 1, dtype=torch.long, device=next(base.parameters()).device)
    names = ["input_ids"]
    if is_encoder_decoder(base):
        names.append("decoder_input_ids")
    hook = head.register_forward_hook(replace)
    # Packed sequences may be in force, of another batch than the probe's.
    packed = PackedSequences(((1,),) * rows, 1) if takes_attention_functions(base) else None
    try:
        # In eval mode dropout draws no random numbers, so that a training run is not altered.
        with in_eval_mode(base), attention_within(base, packed):
            logits: Tensor = base(**dict.fromkeys(names, ids), use_cache=False).logits
    finally:
        hook.remove()
    return outputs, logits
