"""Routers: the layers that tell which experts a token goes to."""

from __future__ import annotations

from torch import nn

from lorakit.models.base import base_modules
from lorakit.models.linear_probe import own_class
from lorakit.models.paths import is_within
from lorakit.upstream.private_names import own_parameters

ROUTER = "router"
"""The name by which most families call it, or the module around it."""
EXPERTS = "experts"


def routers(model: nn.Module) -> tuple[str, ...]:
    """The paths of a model's routers, Linears and modules of their own kind.

    The Linears are those in a module called router, and those with as many outputs as there are
    experts in the module of that name beside them.
    """
    modules = dict(base_modules(model))
    return tuple(
        path
        for path, module in modules.items()
        if is_own_kind(module)
        or (isinstance(module, nn.Linear) and _is_router(path, module, modules))
    )


def is_own_kind(module: nn.Module) -> bool:
    """Whether a module is a router that multiplies with a weight of its own, and is no Linear.

    Such a one (Mixtral's, Qwen-MoE's, DeepSeek's, gpt-oss's) returns scores and the numbers of
    experts, or multiplies in another precision. transformers calls the class of each so.
    """
    weight = own_parameters(module).get("weight")
    is_matrix = weight is not None and weight.dim() == 2
    named = own_class(module).__name__.endswith(ROUTER.capitalize())
    return is_matrix and named and not isinstance(module, nn.Linear)


def _is_router(path: str, layer: nn.Linear, modules: dict[str, nn.Module]) -> bool:
    *names, _ = path.split(".")
    if ROUTER in path.split("."):
        return True
    around = (names[:-1], names) if names else (names,)
    beside = (".".join([*each, EXPERTS]) for each in around)
    return any(
        _count(modules[each]) == layer.out_features and not is_within(path, (each,))
        for each in beside
        if each in modules
    )


def _count(experts: nn.Module) -> int:
    """The number of experts of a module."""
    count = getattr(experts, "num_experts", None)
    return count if isinstance(count, int) else sum(1 for _ in experts.children())
