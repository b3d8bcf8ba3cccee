"""Activation checkpointing with a save policy: blocks keep some activations and recompute the rest.

Torch's checkpointing runs the forward pass of a block again when its gradients are needed. Most of
its time goes into matmuls, so a save policy keeps those that are cheap to store, and the
recomputation takes them over.
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
_MATMULS = {
    _ATEN.mm.default: 0,
    _ATEN.addmm.default: 1,
    _ATEN.bmm.default: 0,
    _ATEN.baddbmm.default: 1,
}
"""Matmuls, with the position of the first factor among the arguments."""
_OPERATIONS = {*_MATMULS, *FUSED_ATTENTIONS}

NARROW = 8
"""A·x is narrower than x at least by this factor; no other matmul of a block is."""

SavePolicy = Callable[..., bool]
"""Whether the result of an operation is saved, from the operation and its arguments."""


def matmuls(operation: Any, *arguments: Any, **options: Any) -> bool:
    """The save policy of `balanced`: matmuls with a weight, A·x, and fused attention.

    B·(A·x) takes little time, and the probabilities of unfused attention take much memory.
    """
    if operation in FUSED_ATTENTIONS:
        return not _is_random(operation, arguments, options)
    if operation in (_ATEN.mm.default, _ATEN.addmm.default):
        inner, columns = _sizes(operation, arguments)
        return columns <= NARROW * inner
    return narrow_matmuls(operation, *arguments)


def narrow_matmuls(operation: Any, *arguments: Any, **options: Any) -> bool:
    """The save policy of `low`: A·x, one of whose dimensions is the rank."""
    if operation not in _MATMULS:
        return False
    inner, columns = _sizes(operation, arguments)
    rows = arguments[_MATMULS[operation]].shape[-2]
    return min(rows, columns) * NARROW <= inner


def _sizes(operation: Any, arguments: tuple[Any, ...]) -> tuple[int, int]:
    """The inner dimension of a matmul, and the columns of its result."""
    matrix = arguments[_MATMULS[operation] + 1]
    return matrix.shape[-2], matrix.shape[-1]


def _is_random(operation: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Whether attention has dropout: skipping it would shift the random numbers after it."""
    names = [argument.name for argument in arguments_of(operation)]
    given = dict(zip(names, arguments, strict=False)) | dict(options)
    return bool(given.get("dropout_p", 0.0))


class SavedActivations:
    """The saved activations of one block, as the `context_fn` of torch's `checkpoint`.

    It makes two dispatch modes: under one the forward pass saves results, under the other the
    recomputation takes them in the same order. A recomputation ends as soon as autograd has all it
    needs; results after that point are not saved from the next step on.
    """

    def __init__(self, save_policy: SavePolicy, *, offload: bool) -> None:
        self.save_policy = save_policy
        self.offload = offload
        self.unreached = 0
        """Results at the end of the forward pass that the last recomputation did not reach."""

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """The dispatch modes of one forward pass and of its recomputation."""
        results: list[_Result] = []
        return _Save(self, results), _Reuse(self, results)


class _Result:
    """The result of one operation of a block; its `value` is None where it is not saved.

    A later operation may write into it before anything reads it, as an adapter adds its update to a
    layer's output. Then the value after the write is saved, and the recomputation skips the write.
    """

    def __init__(self, operation: Any, arguments: tuple[Any, ...], value: Any) -> None:
        self.signature = _signature(operation, arguments)
        self.value = value
        self.read = False
        self.written = False
        self.versions: list[int] = []

    def note_read(self) -> None:
        """Note that a later operation reads the value."""
        self.read = True

    def note_write(self) -> None:
        """Note that a later operation writes into the value; if it was read before, drop it."""
        self.written = True
        if self.read:
            self.value = None

    def settle(self, *, keep: bool, offload: bool) -> None:
        """Detach the value from its graph, in the CPU's memory with `offload`; or drop it."""
        self.value = tree_map(_to_cpu if offload else _detached, self.value) if keep else None
        self.versions = _versions(self.value)

    def take(self, operation: Any, arguments: tuple[Any, ...]) -> Any:
        """The saved value, once, if it is of this operation and unchanged; else None."""
        value, self.value = self.value, None
        if self.signature != _signature(operation, arguments) or self.versions != _versions(value):
            return None
        device = arguments[0].device
        return tree_map(lambda each: _to(each, device), value)


def _touched(operation: Any, arguments: tuple[Any, ...]) -> Iterator[tuple[int, bool]]:
    """Yield each storage that an operation reads or writes, and whether it is written.

    Making a view of a storage is neither.
    """
    if operation is UNSAFE_VIEW:
        return
    for argument, value in zip(arguments_of(operation), arguments, strict=False):
        alias = argument.alias_info
        if alias is None or alias.is_write:
            for storage in _storages(value):
                yield storage, alias is not None


def _storages(value: Any) -> list[int]:
    """The addresses of the storages of all tensors in a value."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return [storage_number(tensor) for tensor in tensors]


def _signature(operation: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return operation, [x.shape for x in arguments if isinstance(x, Tensor)]


def _versions(value: Any) -> list[int]:
    return [write_count(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _to_cpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    pinned = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
    return pinned.copy_(value.detach())


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


class _Save(TorchDispatchMode):
    """Saves results of a forward pass."""

    def __init__(self, memory: SavedActivations, results: list[_Result]) -> None:
        super().__init__()
        self.memory = memory
        self.results = results
        self.owners: dict[int, _Result] = {}
        """The results by their storages."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        value = func(*args, **(kwargs or {}))
        for storage, is_written in _touched(func, args):
            if storage in self.owners:
                owner = self.owners[storage]
                owner.note_write() if is_written else owner.note_read()
        if func in _OPERATIONS:
            is_saved = self.memory.save_policy(func, *args, **(kwargs or {}))
            self.results.append(_Result(func, args, value if is_saved else None))
            self.owners.update(dict.fromkeys(_storages(value), self.results[-1]))
        return value

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.owners.clear()
        needed = len(self.results) - self.memory.unreached
        for number, result in enumerate(self.results):
            result.settle(keep=number < needed, offload=self.memory.offload)


class _Reuse(TorchDispatchMode):
    """Gives a recomputation the saved results in place of computing them again."""

    def __init__(self, memory: SavedActivations, results: list[_Result]) -> None:
        super().__init__()
        self.memory = memory
        self.results = results
        self.reached = 0
        self.final: dict[int, Any] = {}
        """Results that hold later writes already, by their storages: these writes are skipped."""

    def __enter__(self) -> Any:
        self.reached = 0
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(storage in self.final for storage, written in _touched(func, args) if written):
            return args[0]
        value = self._saved(func, args) if func in _OPERATIONS else None
        return func(*args, **(kwargs or {})) if value is None else value

    def _saved(self, func: Any, args: tuple[Any, ...]) -> Any:
        if self.reached >= len(self.results):
            return None
        result = self.results[self.reached]
        self.reached += 1
        value = result.take(func, args)
        if value is not None and result.written:
            # The value is referenced here so that its storage's address is not used again.
            self.final.update(dict.fromkeys(_storages(value), value))
        return value

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.final.clear()
        self.memory.unreached = len(self.results) - self.reached


@contextmanager
def recomputing(
    model: nn.Module, save_policy: SavePolicy, *, offload: bool = False
) -> Iterator[list[str]]:
    """Checkpoint the activations of a model's blocks inside a `with` block.

    Blocks below the lowest trained parameter have no backward pass, and stay as they are. The
    recomputation has the random numbers of the forward pass. The input of a block is always saved.

    Args:
        model: a model of transformers.
        save_policy: which results of operations are saved: `matmuls` or `narrow_matmuls`.
        offload: keep what is saved in the CPU's memory.

    Yields:
        The paths of the blocks that are checkpointed.
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
"""The attributes in which transformers keeps a block's checkpointing."""


def _settings(block: nn.Module) -> dict[str, Any]:
    return {name: vars(block)[name] for name in _SETTINGS if name in vars(block)}


def _offloading(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Checkpoint a block, with its inputs saved in the CPU's memory."""
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *arguments, **options)


def has_blocks(model: nn.Module) -> bool:
    """Whether transformers can checkpoint a model block by block."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return any(isinstance(module, GradientCheckpointingLayer) for module in model.modules())


def blocks_with_gradients(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and block of the checkpointable blocks that gradients flow through.

    These are the blocks that hold a trained parameter, and all after the first module that does.
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
