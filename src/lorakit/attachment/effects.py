"""Whether adapters act where they are, found out in the first calls of a model.

No list of architectures says which layers a model calls, and whether it gives them the rows of the
batch first; the calls do. The first ones of a kind are looked at, later ones are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import AttachError, RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.batch_rows import first_tensor, has_tokens
from lorakit.layers.operation import Operation
from lorakit.layers.route import Frame, Route
from lorakit.models.base import base_modules, device_of, has_compiled_parts, in_eval_mode
from lorakit.models.roles import input_embedding
from lorakit.upstream.private_names import (
    TorchDispatchMode,
    own_parameters,
    storage_number,
    tree_leaves,
    tree_map,
)

CACHES = ("past_key_values", "cache_params")
"""What calls of transformers' models are given to go on from."""

OF_CACHE = ("use_cache", "cache_position")
LABELS = ("labels", "label", "start_positions", "end_positions")
"""What a call needs for its cache, and for its loss."""

Layers = Mapping[int, AdaptedLayer]
Kind = tuple[bool, bool, bool]
"""Of a call: whether it is for training, takes gradients, and goes on from a cache."""


@dataclass(frozen=True)
class ModelCall:
    """A call of a model."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """The facts about a call that may make a model take another way through its layers."""
        return self.model.training, torch.is_grad_enabled(), self._goes_on()

    def _goes_on(self) -> bool:
        cache = self.kwargs.get("past_key_values")
        if cache is None:
            return self.kwargs.get("cache_params") is not None
        return has_tokens(cache)

    def again(self, change: Callable[[Any], Any] = lambda x: x, *, cache: bool) -> None:
        """Call the model once more without gradients, with what a function makes of each tensor.

        Args:
            change: from a tensor or another value to what is given in its place.
            cache: whether to go on from a copy of the cache, and not to start anew.
        """
        kwargs = dict(self.kwargs)
        for name in set(CACHES) & kwargs.keys():
            kwargs[name] = copy.deepcopy(kwargs[name]) if cache else None
        if not cache:
            kwargs = {n: v for n, v in kwargs.items() if n not in (*OF_CACHE, *LABELS)}
        args, kwargs = tree_map(change, (self.args, kwargs))
        device = device_of(self.model)
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.model.forward(*args, **kwargs)


@dataclass(eq=False)
class Effects:
    """What was found out about the adapted layers of a model, by their numbers."""

    rows_first: set[int] = field(default_factory=set)
    """Those whose input has the rows of the batch first."""
    watched: dict[Kind, set[int]] = field(default_factory=dict)
    """By kind of call: those that were called, or have no weight that was read."""
    latest: tuple[Kind, object] | None = None
    """The kind and the route of the latest call that was not looked at."""
    watching: tuple[Kind, set[int]] | None = None
    """The kind of the call that is looked at, and the layers that are new there."""

    def forget(self, numbers: Collection[int]) -> None:
        """Look at some layers anew, since an adapter has come to them."""
        self.latest = None
        for known in self.watched.values():
            known.difference_update(numbers)

    def begin(self, call: ModelCall, route: Route, layers: Layers) -> None:
        """Have those layers noted which a call does not come to, if it is one of the first."""
        if route.unsure or route.waiting:
            route.unsure, route.waiting = set(), set()
        self.watching = None
        top, kind = route.top, call.kind
        if top.operations is None or self.latest == (kind, top.key):
            return
        new = top.operations.keys() - self.watched.get(kind, set())
        if not new or has_compiled_parts(call.model):
            self.latest = kind, top.key
            return
        self.watching = kind, new
        route.waiting = {n for n in new if n in layers and not layers[n].uncalled}

    def end(self, call: ModelCall, route: Route, layers: Layers) -> None:
        """Find out what a call did not show.

        Raises:
            RouteError: the rows of a layer's input are not those of the batch.
            AttachError: the model has read the weights of a layer that it has not called.
        """
        if route.unsure:
            unsure, route.unsure = route.unsure - self.rows_first, set()
            if unsure:
                self._prove_rows(call, route, {n: layers[n] for n in unsure}, came=True)
        if self.watching is None:
            return
        (kind, new), self.watching = self.watching, None
        waiting, route.waiting = route.waiting, set()
        if waiting:
            _check_unread(call, route, {number: layers[number] for number in waiting})
        self.watched.setdefault(kind, set()).update(new)

    def prove_all_rows(self, call: ModelCall, route: Route, layers: Layers) -> None:
        """Find out whether rows come first in all layers of a route, before code that is compiled.

        Raises:
            RouteError: they do not.
        """
        top = route.top
        numbers = () if top.operations is None or top.rows in (None, 1) else top.operations
        new = {n: layers[n] for n in numbers if n not in self.rows_first and n in layers}
        new = {n: layer for n, layer in new.items() if not layer.adapter_pieces}
        if new:
            self._prove_rows(call, route, new, came=False)

    def _prove_rows(self, call: ModelCall, route: Route, layers: Layers, *, came: bool) -> None:
        """Call the model with more rows, and see whether each layer gets as many entries more.

        Args:
            call: what is made once more.
            route: of the model.
            layers: those in question, by number.
            came: whether the call has come to them.

        Raises:
            RouteError: some do not.
        """
        first = first_tensor(call.args, call.kwargs)
        sizes = (0,) if first is None else tuple(first.shape)
        # As many rows as no row has tokens.
        more = next(more for more in (1, 2, 3) if sizes[0] + more not in sizes[1:3])
        notes = {number: Noted() for number in layers}

        last = getattr(input_embedding(call.model), "num_embeddings", 1) - 1

        def longer(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != sizes[0]:
                return x
            if x.dtype in (torch.int64, torch.int32):
                # Where virtual tokens go stand ids that no embedding has.
                x = x.clamp(0, last)
            return torch.cat([x, *[x[:1]] * more])

        problem = ""
        with in_eval_mode(call.model), route.own.pushed(Frame(notes)):
            try:
                call.again(longer, cache=False)
            except Exception as error:
                problem = f" (a batch of another size, to tell them apart, fails: {error})"
        self.rows_first |= {n for n, noted in notes.items() if noted.firsts == {sizes[0] + more}}
        other = [
            layers[n].adapter_path
            for n, noted in notes.items()
            if n not in self.rows_first and (came or noted.firsts or problem)
        ]
        if other:
            raise RouteError(
                f"the rows cannot differ: {len(other)} adapted layers, such as {other[0]}, are "
                f"given tokens, windows or images first, and not rows{problem}; route the whole "
                "batch to one adapter, or leave them out"
            )


class Noted(Operation):
    """Notes the first size of a layer's input, and leaves the output as it is."""

    def __init__(self) -> None:
        self.firsts: set[int] = set()

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The output."""
        self.firsts.add(inputs[0].shape[0])
        return output


class Reads(TorchDispatchMode):
    """Notes which of some tensors torch's operations use."""

    def __init__(self, tensors: Mapping[int, str]) -> None:
        """Look for tensors by the numbers of their memory, with the names of their owners."""
        super().__init__()
        self.tensors = tensors
        self.found: dict[str, None] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The operation's own result."""
        if operation is not torch.ops.aten.detach.default:
            for x in tree_leaves((args, kwargs or {})):
                name = self.tensors.get(storage_number(x)) if isinstance(x, Tensor) else None
                if name is not None:
                    self.found[name] = None
        return operation(*args, **(kwargs or {}))


def _check_unread(call: ModelCall, route: Route, layers: Layers) -> None:
    """Refuse layers that a call did not come to, though it used their weights.

    A branch that was skipped, such as an expert that nobody chose, uses none.

    Raises:
        AttachError: there are such.
    """
    reads = Reads(_own_memory(call.model, layers))
    route.waiting = set(layers)
    try:
        with reads:
            call.again(cache=True)
    except Exception:
        # The call was answered before: what can't be asked again is not held against it.
        return
    finally:
        waiting, route.waiting = route.waiting, set()
    paths = [layers[n].adapter_path for n in waiting if layers[n].adapter_path in reads.found]
    if paths:
        raise AttachError.listing(
            "the adapter does nothing in some layers, whose weights the model reads without "
            "calling them: merge it (measure=False), or leave these layers out (exclude)",
            sorted(paths),
        )


def _own_memory(model: nn.Module, layers: Layers) -> dict[int, str]:
    """The layers' paths by the memory of those weights that no other layer has too."""
    holders: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        for parameter in own_parameters(module).values():
            if parameter is not None and not parameter.is_meta:
                holders.setdefault(storage_number(parameter), []).append(path)
    paths = {layer.adapter_path for layer in layers.values()}
    return {
        number: own[0] for number, own in holders.items() if len(set(own)) == 1 and own[0] in paths
    }
