"""The settings of TRL's losses of preferences that `preference.trl` may have, by TRL's names."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, FiniteFloat, PositiveFloat

from lorakit.config.base import Settings

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
"""The probability that a row has its answers the wrong way round."""
Weight = Annotated[FiniteFloat, Field(ge=0)]
"""What a part of a loss is multiplied by."""


def _listed(value: Any) -> Any:
    """A list of one text; any other value is left to be validated."""
    return [value] if isinstance(value, str) else value


class DpoLoss(Settings):
    """Of `DPOTrainer`. The bounds are lorakit's: TRL would compute no number, or nonsense."""

    loss_type: Annotated[list[str], BeforeValidator(_listed)] = Field(["sigmoid"], min_length=1)
    """The losses that are summed, such as apo_zero, or sigmoid and sft."""

    loss_weights: list[Weight] | None = None
    """A weight for each of them; 1 without."""

    label_smoothing: Smoothing = 0.0
    """Of robust, exo_pair, aot and aot_unpaired."""

    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens of an answer beyond the length of the shorter one (LD-DPO)."""

    use_weighting: bool = False
    """Whether rows are weighted by how likely their answers are (WPO)."""

    discopop_tau: PositiveFloat = 0.05
    """Of discopop: the temperature between its two parts."""

    f_divergence_type: str = "reverse_kl"
    """What the distance to the reference is measured by (f-DPO)."""

    f_alpha_divergence_coef: FiniteFloat = 0.5
    """α of alpha_divergence."""

    router_aux_loss_coef: Weight = 0.0
    """Weight of the loss that balances the load of experts. Here 0, where TRL takes the base's."""


class CpoLoss(Settings):
    """Of `CPOTrainer`."""

    loss_type: str = "sigmoid"
    """sigmoid, hinge, ipo or simpo."""

    label_smoothing: Smoothing = 0.0
    """Of sigmoid and simpo."""

    alpha: FiniteFloat = 0.0
    """Exponent of the reward's shape (AlphaPO); 0: the logarithm."""

    cpo_alpha: Weight = 0.0
    """Of simpo: weight of the usual loss of the chosen answers."""
