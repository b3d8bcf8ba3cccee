"""A base that runs some of its blocks several times: copies of blocks that share their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lorakit.config.block_ranges import block_order
from lorakit.errors import ModelError
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.identity import identify
from lorakit.models.paths import outermost
from lorakit.models.quantized import original_identity
from lorakit.models.roles import task_heads
from lorakit.models.shape import is_encoder_decoder


def replicate_layers(model: nn.Module, order: str) -> None:
    """Have a base run its blocks in another order, some of them several times, in place.

    Each is a copy of a block with the block's own weights, so that memory grows by caches and
    adapters alone, and each can have an adapter of its own: depth up-scaling as PEFT's
    `layer_replication` has it. What the base is told by stays that of the base as it was.

    Args:
        model: a base with one stack of blocks, without adapters.
        order: the blocks, such as "0-3,2-4": the first four, and then the third to the fifth.

    Raises:
        ModelError: an adapter is attached, blocks were repeated before, there are several stacks
            of blocks or none, or the order names a block that the base does not have.

    Examples:
        >>> lk.replicate_layers(model, "0-19,10-29")
        >>> len(model.model.layers)
        40
    """
    try:
        numbers = block_order(order)
    except ValueError as error:
        raise ModelError(str(error)) from None
    path, blocks = _blocks(model)
    _check(model, order, numbers, len(blocks))
    if original_identity(model) is None:
        identity = identify(model, skip=task_heads(model))
        model._lorakit_original = identity  # type: ignore[assignment]
    made = nn.ModuleList(_copy(blocks[number], at) for at, number in enumerate(numbers))
    model.set_submodule(path, made)
    _adjust(getattr(model, "config", None), numbers, len(blocks))
    model._lorakit_order = order  # type: ignore[assignment]


def replication_of(model: nn.Module) -> str | None:
    """The order in which a base runs its blocks; None: each once."""
    found = getattr(model, "_lorakit_order", None)
    return None if found is None else str(found)


def part_copies(model: nn.Module) -> None:
    """Give each parameter that several blocks share to one of them alone, and the others copies.

    Nothing else can be saved as a plain model, which has all its blocks.
    """
    if replication_of(model) is None:
        return
    path, _ = _blocks(model)
    seen: set[int] = set()
    for _, module in base_modules(model.get_submodule(path)):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(module, name, own)
            seen.add(id(parameter))


def same_order(one: str | None, other: str | None) -> bool:
    """Whether two orders name the same blocks one after the other."""
    return one == other or (one and block_order(one)) == (other and block_order(other))


def _blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path of a base's one list of blocks, and the list.

    Raises:
        ModelError: it has none, or several.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = {
        path: module
        for path, module in base_modules(model)
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    found = outermost(list(lists))
    stacks = is_encoder_decoder(model)
    if len(found) != 1 or stacks:
        raise ModelError(
            f"layer_replication is for a model with one stack of blocks, and {type(model).__name__}"
            f" has {'two' if stacks else len(found)}"
        )
    return found[0], lists[found[0]]


def _check(model: nn.Module, order: str, numbers: Sequence[int], count: int) -> None:
    before = replication_of(model)
    problem = ""
    if hasattr(model, "_lorakit"):
        problem = "adapters are attached: detach them first"
    elif before is not None:
        problem = f"they are already, as {before}: load the base anew"
    elif max(numbers) >= count:
        problem = f"{order} names block {max(numbers)}, and there are {count}, counted from 0"
    if problem:
        raise ModelError(f"the blocks of {type(model).__name__} can't be repeated: {problem}")


def _copy(block: nn.Module, number: int) -> nn.Module:
    """A block with the parameters and buffers of another, at another place."""
    memo: dict[int, Any] = {id(each): each for _, each in base_parameters(block)}
    memo |= {id(each): each for each in block.buffers()}
    configs = (getattr(module, "config", None) for module in block.modules())
    memo |= {id(config): config for config in configs}
    made = copy.deepcopy(block, memo)
    for module in made.modules():
        # Caches have an entry for each block, by this number.
        if isinstance(getattr(module, "layer_idx", None), int):
            vars(module)["layer_idx"] = number
    return made


def _adjust(config: Any, numbers: Sequence[int], count: int) -> None:
    """Have a config tell of each block where it told of those of the base."""
    settings: Mapping[str, Any] = dict(vars(config))
    config.num_hidden_layers = len(numbers)
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == count and not name.startswith("_"):
            setattr(config, name, [value[number] for number in numbers])
