"""What a model does to the logits behind its head: described by its config, and always tried.

Gemma caps them, Cohere and Granite scale them. A head's answer can be left to others than the model
if what the model makes of it is known.
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

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
# Granite divides by what HyperCLOVA X multiplies with, under one name; the trial tells.
_DIVISORS = ("logits_scaling",)

_FOUND: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


def logit_transform(base: nn.Module, head: nn.Module, *, rows: int) -> LogitTransform | None:
    """Return what a language model does to its head's answer; None: something not known here.

    One trial for each model, in which the head answers with known numbers, decides; a config only
    says what is worth a comparison.

    Args:
        base: the model, without wrappers.
        head: its output head.
        rows: of the trial's batch, since routes know how many rows there are.
    """
    if base not in _FOUND:
        _FOUND[base] = _probed(base, head, rows)
    return _FOUND[base]


def _probed(base: nn.Module, head: nn.Module, rows: int) -> LogitTransform | None:
    answers, logits = _probe(base, head, rows)
    if len(answers) != 1:
        return None
    if torch.equal(logits.to(answers[0]), answers[0]):
        return IDENTITY
    return next((d for d in _described(base) if _explains(d, answers[0], logits)), None)


def _described(base: nn.Module) -> Iterator[LogitTransform]:
    """Yield the changes that the numbers in a model's config can mean."""
    config: Any = base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = (getattr(config, name, None) for name in names)
        return [float(v) for v in values if isinstance(v, int | float) and v]

    scales = [1.0, *numbers(_FACTORS), *(1 / number for number in numbers(_DIVISORS))]
    for scale, cap in product(scales, [None, *numbers(_CAPS)]):
        change = LogitTransform(scale=scale, cap=cap)
        if not change.is_none:
            yield change


def _explains(change: LogitTransform, answer: Tensor, logits: Tensor) -> bool:
    """Whether a change makes a model's logits of its head's answer, but for rounding.

    The model rounds up to three times to its own precision, half a unit each, and both sides to
    that of the change, where devices compute tanh to a few units.
    """
    found = answer.to(torch.promote_types(answer.dtype, torch.float32), copy=True)
    change.apply_(found)
    units = 2 * torch.finfo(answer.dtype).eps + 8 * torch.finfo(found.dtype).eps
    return torch.allclose(found, logits.to(found), rtol=units, atol=0)


@torch.no_grad()
def _probe(base: nn.Module, head: nn.Module, rows: int) -> tuple[list[Tensor], Tensor]:
    """Let a head answer with numbers of all sizes; return its answers and the model's logits."""
    answers: list[Tensor] = []

    def answer(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        sizes = torch.logspace(-2, 3, output.numel(), device=output.device)
        sizes[::2] *= -1
        answers.append(sizes.to(output.dtype).view(output.shape))
        return answers[-1].clone()

    ids = torch.zeros(rows, 1, dtype=torch.long, device=next(base.parameters()).device)
    names = ["input_ids"]
    if getattr(base.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    training = [module for module in base.modules() if module.training]
    hook = head.register_forward_hook(answer)
    # The batch at hand may have packed sequences in force, which these tokens do not have.
    packed = PackedSequences(((1,),) * rows, 1) if takes_attention_functions(base) else None
    # Dropout draws nothing then, so that a run goes on as one that was not tried.
    base.eval()
    try:
        with attention_within(base, packed):
            logits: Tensor = base(**dict.fromkeys(names, ids), use_cache=False).logits
    finally:
        hook.remove()
        for module in training:
            module.training = True
    return answers, logits
