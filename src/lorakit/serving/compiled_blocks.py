"""The blocks of a model as compiled code for one step: traced one by one, compiled once if alike.

A block is recorded as the operations that it runs on tensors, adapters included, and its weights
become inputs of the graph. Blocks whose graphs are equal to the letter share their code, so that a
model of thirty blocks is compiled in the time of one. Nothing is executed to compile: keys and
values are written by steps alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Cache

from lorakit.attachment.state import begin_call, end_call
from lorakit.errors import ModelError
from lorakit.layers.route import Frame, Route
from lorakit.models.base import base_modules
from lorakit.serving.kv_slots import SlotLayer, WatchedCache
from lorakit.upstream.private_names import (
    forget_hooks,
    own_modules,
    traced,
    tree_flatten,
    tree_unflatten,
    twin_of,
)

Compile = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]
"""Makes a graph and inputs like its own into code that takes such inputs one by one."""


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by their paths, without those inside of others.

    Raises:
        ModelError: it has none.
    """
    # Imported late: it sets up loggers, which importing lorakit must not.
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for path, module in base_modules(model):
        inside = any(path.startswith(f"{each}.") for each in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[path] = module
    if not found:
        raise ModelError(f"{type(model).__name__} has no blocks that transformers can checkpoint")
    return found


def twin_with(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> nn.Module:
    """A model that shares all modules with another one, but has its own forward passes of some.

    Args:
        model: stays as it is.
        forwards: by the paths of their modules.
    """
    twin = _twin(model, "", forwards)
    # Which layers a call has come to, they cannot see.
    forget_hooks(twin, begin_call, end_call)
    return twin


def _twin(module: nn.Module, path: str, forwards: Mapping[str, Callable[..., Any]]) -> nn.Module:
    made = twin_of(module)
    if path in forwards:
        vars(made)["forward"] = forwards[path]
        return made
    children = own_modules(made)
    for name, child in list(children.items()):
        own = f"{path}.{name}" if path else name
        if child is not None and any(f"{each}.".startswith(f"{own}.") for each in forwards):
            children[name] = _twin(child, own, forwards)
    return made


class TracedCache:
    """Stands for the cache while a block is traced: one layer, whose last column is written."""

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        self._states, self._column = (keys, values), column

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that the step's rows see."""
        for buffer, states in zip(self._states, (key_states, value_states), strict=True):
            # An index that is a tensor is written in place by the compiler.
            buffer[:, :, self._column] = states
        return self._states


class Tree:
    """What a block is given or gives: tensors, the cache, and other values, in any nesting."""

    def __init__(self, value: object) -> None:
        self._leaves, self._form = tree_flatten(value)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in it."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    @property
    def cache(self) -> WatchedCache | None:
        """The cache in it."""
        return next((leaf for leaf in self._leaves if isinstance(leaf, WatchedCache)), None)

    @property
    def kind(self) -> tuple[object, ...]:
        """The same for what one graph takes."""
        return (self._form, *map(_kind, self._leaves))

    def filled(self, tensors: Iterable[Tensor], cache: object) -> Any:
        """The same with other tensors and another cache."""
        left = iter(tensors)

        def own(leaf: object) -> object:
            if isinstance(leaf, Tensor):
                return next(left)
            return cache if isinstance(leaf, Cache | TracedCache) else leaf

        return tree_unflatten([own(leaf) for leaf in self._leaves], self._form)


def _kind(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        # Where there is one entry, the step to the next one says nothing.
        steps = [step for size, step in zip(leaf.shape, leaf.stride(), strict=True) if size > 1]
        return leaf.shape, tuple(steps), leaf.dtype, leaf.device
    return Cache if isinstance(leaf, Cache) else leaf


@dataclass(frozen=True)
class Recorded:
    """A block, and how it was called in a step."""

    block: nn.Module
    call: Tree
    """Its positional and keyword arguments."""
    layer: int
    """The number of its keys and values in the cache."""
    states: tuple[Tensor, Tensor]
    """Those."""


@dataclass(frozen=True)
class CompiledBlock:
    """The code of one block for one kind of step."""

    run: Callable[..., Any]
    kind: tuple[object, ...]
    """Of the calls that it answers."""
    layer: int
    constants: tuple[Tensor, ...]
    """Its weights, and A and B of the slots."""
    column: Tensor
    output: Tree

    def __call__(self, call: Tree, cache: Cache) -> Any:
        """What the block returns.

        Raises:
            ModelError: it is called in another way than the one that was compiled.
        """
        if call.kind != self.kind:
            raise ModelError("a block was called in another way than before")
        states = cast(SlotLayer, cache.layers[self.layer]).seen()
        made = self.run(*call.tensors, *states, self.column, *self.constants)
        return self.output.filled(made, cache)


class BlockCompiler:
    """Compiles blocks, equal ones once.

    Args:
        route: of the model.
        frame: the operations of the step, in this thread's own form.
        compile_one: makes a graph into code.
        linears: a block in which linear layers are computed as in a step.
    """

    def __init__(
        self,
        route: Route,
        frame: Frame,
        compile_one: Compile,
        linears: AbstractContextManager[Any],
    ) -> None:
        self._route, self._frame, self._compile = route, frame, compile_one
        self._linears = linears
        self._made: dict[object, Callable[..., Any]] = {}

    @property
    def count(self) -> int:
        """How many different blocks there were so far."""
        return len(self._made)

    @torch.no_grad()
    def compiled(self, recorded: Recorded) -> CompiledBlock:
        """The code of a block that was recorded.

        Raises:
            Exception: whatever the tracer or the compiler finds.
        """
        call, (keys, values) = recorded.call, recorded.states
        column = torch.tensor([keys.shape[2] - 1], device=keys.device)
        outputs: list[Tree] = []

        def run(*inputs: Tensor) -> list[Tensor]:
            *tensors, own_keys, own_values, own_column = inputs
            cache = TracedCache(own_keys, own_values, own_column)
            args, kwargs = call.filled(tensors, cache)
            with self._route.own.pushed(self._frame), self._linears:
                outputs.append(Tree(recorded.block.forward(*args, **kwargs)))
            return outputs[-1].tensors

        inputs = [*call.tensors, keys, values, column]
        graph = traced(run, inputs)
        constants = _lifted(graph)
        key = (graph.code, *map(_kind, (*inputs, *constants)))
        if key not in self._made:
            self._made[key] = self._compile(graph, _like(graph, [*inputs, *constants]))
        return CompiledBlock(
            self._made[key], call.kind, recorded.layer, tuple(constants), column, outputs[-1]
        )


def _lifted(graph: GraphModule) -> list[Tensor]:
    """Make the tensors that a graph holds its last inputs, and give them."""
    lifted: dict[int, tuple[Tensor, Any]] = {}
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = cast(Tensor, getattr(graph, cast(str, node.target)))
        if id(tensor) not in lifted:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(lifted)}")
            lifted[id(tensor)] = tensor, last
        node.replace_all_uses_with(lifted[id(tensor)][1])
        graph.graph.erase_node(node)
    graph.recompile()
    return [tensor for tensor, _ in lifted.values()]


def _like(graph: GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Tensors without memory like the inputs of a graph, of the mode in which it was traced."""
    first = next(node for node in graph.graph.nodes if node.op == "placeholder")
    mode = first.meta["val"].fake_mode
    return [cast(Tensor, mode.from_tensor(each, static_shapes=True)) for each in inputs]


class BlockSteps:
    """A model's steps with its blocks in compiled code, or with their calls recorded.

    Args:
        model: stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = blocks_of(model)
        self._record: dict[str, Recorded] | None = None
        self._code: Mapping[str, CompiledBlock] = {}
        self.model = twin_with(model, {p: partial(self._forward, p) for p in self._blocks})
        """Calls the blocks as it is told to, the model's other modules as they are."""

    def recorded(self, step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Recorded]]:
        """What a step of the twin gives, and how it has called each block.

        Raises:
            ModelError: its blocks are of a kind that is not compiled.
        """
        self._record = {}
        try:
            return step(), self._record
        finally:
            self._record = None

    def run(self, code: Mapping[str, CompiledBlock], step: Callable[[], Tensor]) -> Tensor:
        """What a step of the twin gives with its blocks in compiled code."""
        self._code = code
        return step()

    def _forward(self, path: str, *args: Any, **kwargs: Any) -> Any:
        call = Tree((args, kwargs))
        cache = call.cache
        if cache is None:
            raise ModelError(f"{path} is not given the keys and values")
        if self._record is None:
            return self._code[path](call, cache)
        cache.written.clear()
        block = self._blocks[path]
        output = block.forward(*args, **kwargs)
        if len(cache.written) != 1:
            raise ModelError(f"{path} writes keys and values of {len(cache.written)} layers")
        (layer,) = cache.written
        states = cast(SlotLayer, cache.layers[layer]).seen()
        self._record[path] = Recorded(block, call, layer, states)
        return output
