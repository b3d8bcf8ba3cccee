"""Experts whose weights are parameters of three dimensions: one matrix for each expert.

Mixtral, Qwen-MoE, DeepSeek, gpt-oss and most of their kin hold the weights of all experts of a
block in one module, as `gate_up_proj` and `down_proj`, and give it every token with its experts'
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lorakit.upstream.private_names import own_parameters

ROLE_OF = {"gate_proj": "experts.gate", "up_proj": "experts.up", "down_proj": "experts.down"}
"""Roles of parameters that hold one matrix for each expert."""
FUSED = "gate_up_proj"
"""The parameter that holds gate and up of each expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertMatrices:
    """One parameter with a matrix for each expert, (experts, d_out, d_in)."""

    name: str
    count: int
    """The number of experts."""
    d_out: int
    d_in: int
    transposed: bool
    """Whether it is held as (experts, d_in, d_out)."""
    slices: Mapping[str, tuple[tuple[int, int], ...]] = field(compare=False)
    """Output rows of each role of a fused matrix; none: it has one role, or an unknown order."""

    @property
    def role(self) -> str | None:
        """Its role, where it is not fused."""
        return ROLE_OF.get(self.name)


def expert_matrices(module: nn.Module) -> tuple[ExpertMatrices, ...]:
    """The parameters of a module that hold a matrix for each expert; none, if it has no experts."""
    count = getattr(module, "num_experts", None)
    found = (
        (name, parameter)
        for name, parameter in own_parameters(module).items()
        if parameter is not None and parameter.dim() == 3 and len(parameter) == count
    )
    return tuple(_matrices(module, name, parameter) for name, parameter in found)


def gets_all_tokens(module: nn.Module) -> bool:
    """Whether experts get all tokens in their order, each with the numbers of its experts.

    transformers marks such modules (`use_experts_implementation`), whose computation can be chosen.
    """
    return isinstance(getattr(module, "is_concatenated", None), bool)


def _matrices(module: nn.Module, name: str, parameter: Tensor) -> ExpertMatrices:
    count, first, last = parameter.shape
    # Where a module does not say how it holds them, they are (d_out, d_in), as for PEFT.
    transposed = getattr(module, "is_transposed", False)
    d_out, d_in = (last, first) if transposed else (first, last)
    slices: dict[str, tuple[tuple[int, int], ...]] = {}
    if name == FUSED and gets_all_tokens(module):
        half = d_out // 2
        if getattr(module, "is_concatenated", True):
            slices = {"experts.gate": ((0, half),), "experts.up": ((half, d_out),)}
        else:
            slices = {
                role: tuple((at, at + 1) for at in range(start, d_out, 2))
                for start, role in enumerate(("experts.gate", "experts.up"))
            }
    return ExpertMatrices(
        name=name, count=count, d_out=d_out, d_in=d_in, transposed=transposed, slices=slices
    )
