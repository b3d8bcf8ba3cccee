"""Dropout whose mask is made anew from a seed, in the forward and in the backward pass: not stored.

The seed comes from torch's global generator, so that seeding a run, resuming it and recomputing its
activations (which restore that generator) give the same masks again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from lorakit.kernels.stand_in import seeded

_STEPS = 2**16
"""An element is kept or dropped by 16 random bits, so a probability is a multiple of 1/65536."""


@dataclass(frozen=True)
class Dropout:
    """Which elements of an input are dropped, and what the others are multiplied by."""

    probability: float
    """Of an element to be dropped, from 0 to below 1."""
    seed: int

    @staticmethod
    def drawn(probability: float) -> Dropout | None:
        """A new one, its seed drawn from torch's global generator; None: nothing drops."""
        if not probability:
            return None
        return Dropout(probability, int(torch.randint(2**31, ())))

    @property
    def _kept(self) -> int:
        """The number of steps that keep an element."""
        return max(1, round((1 - self.probability) * _STEPS))

    @property
    def factor(self) -> float:
        """The factor on kept elements, with which means stay as they are."""
        return _STEPS / self._kept

    def mask(self, tokens: int, width: int, device: torch.device) -> UInt8[Tensor, "tokens width"]:
        """1 for each element that is kept, and 0 for the others."""
        size = tokens * width
        generator = seeded(device, self.seed)
        # One draw of 64 bits serves four elements, which is four times as fast as `F.dropout`.
        draws = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
        bits = draws.random_(-(2**63), None, generator=generator).view(torch.int16)
        return (bits[:size] >= _STEPS // 2 - self._kept).view(torch.uint8).view(tokens, width)

    def of(self, x: Tensor) -> Tensor:
        """An input (…, features) with elements dropped, by operations of autograd."""
        mask = self.mask(x.shape[:-1].numel(), x.shape[-1], x.device)
        return x * mask.view(x.shape) * self.factor
