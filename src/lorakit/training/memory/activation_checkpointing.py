"""Blocks that forget what their forward pass computed, and compute it again in the backward pass.

Torch's checkpointing runs a block's forward pass again when its gradients are needed. What takes
long in it is the products, so those that are worth their memory are kept and not computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lorakit.models.base import BANK, base_modules
from lorakit.upstream.private_names import (
    CHECKPOINT_FUNCTION,
    FUSED_ATTENTIONS,
    UNSAFE_VIEW,
    TorchDispatchMode,
    arguments_of,
    own_modules,
    storage_number,
    tree_leaves,
    tree_map,
    write_count,
)

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.bmm.default: 0,
    _ATEN.baddbmm.default: 1,
}
"""Products of matrices, with the place of the first factor among the arguments."""
_OPERATIONS = {*_PRODUCTS, *FUSED_ATTENTIONS}

NARROW = 8
"""A·x has fewer columns than x by this factor at least; any other product has not."""

SavePolicy = Callable[..., bool]
"""Tells whether a result is worth its memory, from the operation and its arguments."""


def matmuls(operation: Any, *arguments: Any, **options: Any) -> bool:
    """Tell what `balanced` keeps: products with a weight, A·x, and attention in one operation.

    B·(A·x) costs little, and attention that shows its probabilities has large ones.
    """
    if operation in FUSED_ATTENTIONS:
        return not _is_random(operation, arguments, options)
    if operation in (_ATEN.mm.default, _ATEN.addmm.default):
        inner, columns = _sizes(operation, arguments)
        return columns <= NARROW * inner
    return narrow_matmuls(operation, *arguments)


def narrow_matmuls(operation: Any, *arguments: Any, **options: Any) -> bool:
    """Tell what `low` keeps: A·x, which is as narrow as the rank, lying or standing."""
    if operation not in _PRODUCTS:
        return False
    inner, columns = _sizes(operation, arguments)
    rows = arguments[_PRODUCTS[operation]].shape[-2]
    return min(rows, columns) * NARROW <= inner


def _sizes(operation: Any, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """Return how many numbers each entry of a product sums up, and how many columns it has."""
    matrix = arguments[_PRODUCTS[operation] + 1]
    return matrix.shape[-2], matrix.shape[-1]


def _is_random(operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether attention has dropout: to skip it would give what follows other numbers."""
    names = [argument.name for argument in arguments_of(operation)]
    given = dict(zip(names, arguments, strict=False)) | dict(options)
    return bool(given.get("dropout_p", 0.0))


class SavedActivations:
    """What one block keeps: it makes the two modes that `checkpoint` runs a block under.

    The forward pass notes the results that are worth it, the recomputation takes them in the same
    order. Where it stops, because autograd has all it needs, nothing further is kept next time.
    """

    def __init__(self, save_policy: SavePolicy, *, offload: bool) -> None:
        self.save_policy = save_policy
        self.offload = offload
        self.spare = 0
        """Results at the end of the forward pass that the latest recomputation did not reach."""

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The modes of one forward pass and of its recomputation."""
        results: list[_Result] = []
        return _Keep(self, results), _Reuse(self, results)


class _Result:
    """What an operation gave, as long as it is worth its memory.

    Others may write into it before anything reads it, as an adapter adds its update to a layer's
    output: then what came of it is kept, and not written once more in the recomputation.
    """

    def __init__(self, operation: Any, arguments: tuple[Any, ...], made: Any) -> None:
        self.asked = _question(operation, arguments)
        self.made = made
        self.read = False
        self.written = False
        self.versions: list[int] = []

    def note_read(self) -> None:
        """Note that another operation needs the value as it is."""
        self.read = True

    def note_write(self) -> None:
        """Note that an operation changes the value, which is of no use if both were needed."""
        self.written = True
        if self.read:
            self.made = None

    def settle(self, *, keep: bool, offload: bool) -> None:
        """Let go of the graph behind the result, or of the result; move it if asked."""
        self.made = tree_map(_to_cpu if offload else _detached, self.made) if keep else None
        self.versions = _versions(self.made)

    def take(self, operation: Any, arguments: tuple[Any, ...]) -> Any:
        """Return what was kept, which is given once, or None."""
        made, self.made = self.made, None
        if self.asked != _question(operation, arguments) or self.versions != _versions(made):
            return None
        device = arguments[0].device
        return tree_map(lambda value: _to(value, device), made)


def _touched(operation: Any, arguments: tuple[Any, ...]) -> Iterator[tuple[int, bool]]:
    """Yield what an operation reads or writes: the memory, and whether it is written.

    Another view of the memory is neither.
    """
    if operation is UNSAFE_VIEW:
        return
    for argument, value in zip(arguments_of(operation), arguments, strict=False):
        alias = argument.alias_info
        if alias is None or alias.is_write:
            for memory in _memories(value):
                yield memory, alias is not None


def _memories(value: Any) -> list[int]:
    """Numbers of the memory behind all tensors in a value."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return [storage_number(tensor) for tensor in tensors]


def _question(operation: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return operation, [x.shape for x in arguments if isinstance(x, Tensor)]


def _versions(made: Any) -> list[int]:
    return [write_count(value) for value in tree_leaves(made) if isinstance(value, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _to_cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    pinned = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return pinned.copy_(value.detach())


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class _Keep(TorchDispatchMode):
    """Notes results of a forward pass."""

    def __init__(self, memory: SavedActivations, results: list[_Result]) -> None:
        super().__init__()
        self.memory = memory
        self.results = results
        self.owners: dict[int, _Result] = {}
        """The results by their memory."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for memory, is_written in _touched(func, args):
            if memory in self.owners:
                owner = self.owners[memory]
                owner.note_write() if is_written else owner.note_read()
        if func in _OPERATIONS:
            save_policy = self.memory.save_policy(func, *args, **(kwargs or {}))
            self.results.append(_Result(func, args, made if save_policy else None))
            self.owners.update(dict.fromkeys(_memories(made), self.results[-1]))
        return made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.owners.clear()
        needed = len(self.results) - self.memory.spare
        for place, result in enumerate(self.results):
            result.settle(keep=place < needed, offload=self.memory.offload)


class _Reuse(TorchDispatchMode):
    """Gives a recomputation the results that were kept."""

    def __init__(self, memory: SavedActivations, results: list[_Result]) -> None:
        super().__init__()
        self.memory = memory
        self.results = results
        self.reached = 0
        self.final: dict[int, Any] = {}
        """Results that were given with all that was written into them, by their memory."""

    def __enter__(self) -> Any:
        self.reached = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(memory in self.final for memory, written in _touched(func, args) if written):
            return args[0]
        made = self._kept(func, args) if func in _OPERATIONS else None
        return func(*args, **(kwargs or {})) if made is None else made

    def _kept(self, func: Any, args: tuple[Any, ...]) -> Any:
        if self.reached >= len(self.results):
            return None
        result = self.results[self.reached]
        self.reached += 1
        made = result.take(func, args)
        if made is not None and result.written:
            # Held, so that nothing else comes to lie in this memory.
            self.final.update(dict.fromkeys(_memories(made), made))
        return made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.final.clear()
        self.memory.spare = len(self.results) - self.reached


@contextmanager
def recomputing(
    model: nn.Module, save_policy: SavePolicy, *, offload: bool = False
) -> Iterator[list[str]]:
    """Let the blocks of a model that have a backward pass recompute what is not worth its memory.

    Blocks below the lowest trained parameter have none, and stay as they are. Random numbers are
    those of the forward pass. A block's input is always kept.

    Args:
        model: one of transformers'.
        worth: tells which results of operations are kept: `products`, `narrow_products`.
        offload: keep all that is kept in the CPU's memory.

    Yields:
        The paths of the blocks that recompute.
    """
    blocks = dict(blocks_with_gradients(model))
    before = {path: _settings(block) for path, block in blocks.items()}
    try:
        for block in blocks.values():
            again = partial(
                _offloading if offload else checkpoint,
                use_reentrant=False,
                context_fn=SavedActivations(save_policy, offload=offload),
            )
            vars(block).update({"gradient_checkpointing": True, CHECKPOINT_FUNCTION: again})
        yield list(blocks)
    finally:
        for path, block in blocks.items():
            for name in _SETTINGS:
                vars(block).pop(name, None)
            vars(block).update(before[path])


_SETTINGS = ("gradient_checkpointing", CHECKPOINT_FUNCTION)
"""What transformers keeps in a block about checkpointing."""


def _settings(block: nn.Module) -> dict[str, Any]:
    return {name: vars(block)[name] for name in _SETTINGS if name in vars(block)}


def _offloading(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run a block under `checkpoint`, with its inputs kept in the CPU's memory."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *arguments, **options)


def has_blocks(model: nn.Module) -> bool:
    """Whether transformers can checkpoint a model block by block."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def blocks_with_gradients(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and block of those that transformers can checkpoint and gradients flow through.

    These are the ones that hold a trained parameter, and all after the first module that does.
    """
    # Imported late: it sets up loggers, which importing lorakit must not.
    from transformers.modeling_layers import GradientCheckpointingLayer

    reached = False
    for path, module in base_modules(model):
        own = [*module.parameters(recurse=False)]
        own += [*module.get_submodule(BANK).parameters()] if BANK in own_modules(module) else []
        is_block = isinstance(module, GradientCheckpointingLayer)
        if is_block and (reached or any(p.requires_grad for p in module.parameters())):
            yield path, module
        reached = reached or any(parameter.requires_grad for parameter in own)
