"""What some models do to the logits behind their head: cap·tanh(scale·x/cap), or scale·x alone."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """A change of each logit by itself, with its derivative."""

    scale: float = 1.0
    """Factor on the head's answer (Cohere; Granite divides)."""
    cap: float | None = None
    """Bound that logits approach and never reach (Gemma Team 2024, Gemma 2, section 2). None: no
    bound."""

    @property
    def is_none(self) -> bool:
        """Whether logits stay as they are."""
        return self.scale == 1 and self.cap is None

    def apply_(self, x: Float[Tensor, "*tokens vocabulary"]) -> None:
        """Change a head's answer in place, without rounding between the steps but x's own."""
        if self.scale != 1:
            x.mul_(self.scale)
        if self.cap is not None:
            x.div_(self.cap).tanh_().mul_(self.cap)

    def derivative(
        self, y: Float[Tensor, "*tokens vocabulary"]
    ) -> float | Float[Tensor, "*tokens vocabulary"]:
        """∂y/∂x, from the changed logits y."""
        if self.cap is None:
            return self.scale
        return y.div(self.cap).square_().neg_().add_(1).mul_(self.scale)


IDENTITY = LogitTransform()
