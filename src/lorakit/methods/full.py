"""Full fine-tuning, and that of the last blocks alone (FT and FT^Top2; section 5.1).

Each module that has parameters is trained as a full copy, which computes in the module's place. So
the base is unchanged, and the rows of a batch can choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lorakit.config.base import dtype_name
from lorakit.config.methods import FullConfig
from lorakit.errors import TargetError
from lorakit.methods.component import Component
from lorakit.methods.module_copy import trained_copy
from lorakit.methods.uncalled import uncalled_component
from lorakit.models.base import base_modules
from lorakit.models.blocks import blocks, named_modules
from lorakit.models.families import uncalled_weights
from lorakit.models.paths import is_within, outermost
from lorakit.upstream.private_names import BatchNorm, own_parameters


def components(model: nn.Module, config: FullConfig) -> tuple[Component, ...]:
    """What full fine-tuning trains of a model: all that holds parameters, or its blocks.

    Raises:
        TargetError: the model lacks what it needs.
    """
    within = last_blocks(model, config) if config.only_top else ("",)
    uncalled = uncalled_weights(model)
    copies = outermost([p for p in _holders(model, uncalled) if is_within(p, within)])
    _check_copies(model, copies)
    return (
        *(
            trained_copy(model, path, config.method, dtype=dtype_name(config.dtype))
            for path in copies
        ),
        *(
            uncalled_component(
                model.get_submodule(path),
                path,
                names,
                method=config.method,
                dtype=dtype_name(config.dtype),
            )
            for path, names in uncalled.items()
            if is_within(path, within) and not is_within(path, copies)
        ),
    )


def last_blocks(model: nn.Module, config: FullConfig) -> tuple[str, ...]:
    """The paths of the blocks that top-k trains; of an encoder-decoder, the decoder's.

    Raises:
        TargetError: the blocks are not known, or there are fewer.
    """
    if config.blocks:
        found = named_modules(model, config.blocks, what="full.blocks")
    else:
        found = _known_blocks(model)
    if config.top > len(found):
        raise TargetError(
            f"top-k: full.top is {config.top}, but there are {len(found)} blocks: {found[0]} to "
            f"{found[-1]}"
        )
    return found[-config.top :]


def _known_blocks(model: nn.Module) -> tuple[str, ...]:
    advice = 'name the blocks by full.blocks, such as "model.layers.*[0-9]"'
    try:
        stacks: dict[str, list[str]] = {}
        for block in blocks(model):
            stacks.setdefault(block.stack, []).append(block.path)
    except TargetError as error:
        raise TargetError(f"top-k: {error}: {advice}") from error
    decoders = [stack for stack in stacks if "decoder" in stack.split(".")]
    chosen = decoders if len(stacks) > 1 else list(stacks)
    if len(chosen) != 1:
        raise TargetError(f"top-k: the model has blocks in {', '.join(stacks)}: {advice}")
    return tuple(stacks[chosen[0]])


def _holders(model: nn.Module, uncalled: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the paths of modules with parameters of their own that count when they are called."""
    for path, module in base_modules(model):
        own = {name for name, parameter in own_parameters(module).items() if parameter is not None}
        if own.difference(uncalled.get(path, ())):
            yield path


def _check_copies(model: nn.Module, copies: Sequence[str]) -> None:
    problems = []
    for path in copies:
        module = model.get_submodule(path)
        whole = [name for name, p in module.named_parameters() if not p.is_floating_point()]
        if not path:
            problems.append("the model itself holds parameters: put it into a module")
        if whole:
            problems.append(f"{path}.{whole[0]} has no floating-point values: is it quantised?")
        if any(isinstance(inner, BatchNorm) for inner in module.modules()):
            problems.append(f"{path} keeps running statistics, which an adapter does not hold")
    if problems:
        raise TargetError.listing("the model cannot be trained in full", problems)
