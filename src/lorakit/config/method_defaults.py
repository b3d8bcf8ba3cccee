"""The learning rate and warm-up of each method, where none are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from lorakit.config.base import PositiveFloat, Settings
from lorakit.config.methods import LoRAConfig

REFERENCE_WIDTH = 576
"""The width of the base, SmolLM2's, at which default learning rates are stated."""
NARROWEST = 384
"""The narrowest base of the trials, MiniLM's; a narrower one gets its rates."""


class Defaults(Settings):
    """The training settings of a method where none are given (docs/methods.md says how found)."""

    learning_rate: PositiveFloat
    """Peak learning rate of AdamW on a base of `REFERENCE_WIDTH`."""
    exponent: Annotated[float, Field(ge=0)] = 1.0
    """How the rate falls with the width d of the base: as d to the power of minus this."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from zero."""

    def rate_at(self, width: int) -> float:
        """The peak learning rate on a base of a width, to two digits."""
        wider = max(width, NARROWEST) / REFERENCE_WIDTH
        return float(f"{self.learning_rate * wider**-self.exponent:.2g}")


DEFAULTS: Mapping[str, Defaults] = {
    "lora": Defaults(learning_rate=2e-3),
    "full": Defaults(learning_rate=2e-4),
    "top-k": Defaults(learning_rate=5e-4),
    "bitfit": Defaults(learning_rate=5e-3, exponent=0),
    "prefix-embedding": Defaults(learning_rate=2e-1, exponent=0.5),
    "prefix-layer": Defaults(learning_rate=5e-2, exponent=0.5),
    "adapter-h": Defaults(learning_rate=2e-3),
    "adapter-l": Defaults(learning_rate=1.33e-3),
    "adapter-p": Defaults(learning_rate=2e-3),
    "adapter-d": Defaults(learning_rate=2e-3),
}


FORMS: Mapping[str, Defaults] = {
    "pissa": Defaults(learning_rate=1e-3),
    "freeze_a": Defaults(learning_rate=1e-2),
}
"""The forms of LoRA that need another learning rate than LoRA."""


def defaults_of(method: str, lora: LoRAConfig) -> Defaults:
    """The training settings of a method where none are given.

    Args:
        method: its name.
        lora: LoRA's settings, where that is the method.
    """
    if method == "lora" and lora.init == "pissa":
        return FORMS["pissa"]
    return FORMS["freeze_a"] if method == "lora" and lora.freeze_a else DEFAULTS[method]
