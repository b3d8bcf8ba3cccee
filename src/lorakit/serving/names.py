"""The names that requests may give a server; adapters come and go while others answer."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lorakit.adapter.adapter import Adapter
from lorakit.errors import ConfigError, LorakitError, did_you_mean
from lorakit.serving.places import Places
from lorakit.serving.refusals import RefusalError

What = TypeVar("What")
"""What a name means to those that answer."""


@dataclass(frozen=True)
class Loaded:
    """An adapter that requests may name."""

    folder: Path
    since: int
    """When it was loaded, in seconds since 1970."""
    load_s: float
    """How long that took."""
    record: Adapter
    """Its settings, origin and training card, without tensors."""
    content_hash: str
    """`Adapter.content_hash()`."""
    size_bytes: int
    """The memory of its tensors."""
    base: str
    """Whether it was trained on this base: same, unknown, or how that one differs."""


class Names(ABC, Generic[What]):
    """The base and its adapters by name.

    Args:
        name: what requests call the base.
        places: from which adapters may be loaded.
    """

    def __init__(self, name: str, places: Places) -> None:
        self.name = name
        self.since = int(time.time())
        self.places = places
        self._loaded: dict[str, Loaded] = {}
        self._unloaded: set[str] = set()
        """Names that are not looked for: who unloads an adapter wants it gone."""
        self._loading = threading.RLock()

    @property
    def adapters(self) -> Mapping[str, Loaded]:
        """Those that requests may name."""
        return dict(self._loaded)

    @property
    @abstractmethod
    def resident(self) -> Collection[str]:
        """The names of those in memory."""

    @property
    def pinned(self) -> Collection[str]:
        """The names of those that no budget of memory evicts."""
        return ()

    @property
    @abstractmethod
    def resident_bytes(self) -> int:
        """The memory of those in it."""

    def load_all(self) -> None:
        """Load the adapter that the folder is, or those right in it; none if names are resolved.

        Raises:
            ConfigError: some cannot be used; with the reason of each.
        """
        folder = self.places.folder
        if folder is None:
            return
        if not folder.is_dir():
            raise ConfigError(f"adapters: there is no folder {folder}")
        problems = []
        for place in [] if self.places.resolve else self.places.found():
            try:
                self.load(place.name, str(place))
            except LorakitError as error:
                problems.append(f"{place.name}: {error}")
        if problems:
            raise ConfigError.listing("these adapters can't be served", problems)

    def load(self, name: str, path: str, *, in_place: bool = False) -> None:
        """Load an adapter under a name, and have it answer from then on.

        Requests that were accepted before end on the weights that they began with.

        Args:
            name: what requests call it.
            path: its folder, within the allowed one or relative to it.
            in_place: take the place of an adapter of that name.

        Raises:
            RefusalError: the name is taken, or the path outside of the allowed folder.
            LorakitError: the adapter can't be used; nothing changes.
        """
        with self._loading:
            if name == self.name or not name:
                raise RefusalError(
                    f"an adapter can't be called {name!r}, which means the base",
                    param="lora_name",
                    kind="InvalidUserInput",
                )
            if name in self._loaded and not in_place:
                raise RefusalError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True.",
                    param="lora_name",
                    kind="InvalidUserInput",
                )
            self._load(name, self.places.allowed(path))

    def _load(self, name: str, folder: Path) -> None:
        began = time.monotonic()

        def loaded(record: Adapter, content_hash: str, size_bytes: int, base: str) -> Loaded:
            took = time.monotonic() - began
            return Loaded(folder, int(time.time()), took, record, content_hash, size_bytes, base)

        self._loaded[name] = loaded(*self._take(name, folder))
        self._unloaded.discard(name)

    @abstractmethod
    def _take(self, name: str, folder: Path) -> tuple[Adapter, str, int, str]:
        """Read and verify an adapter, and have it answer under a name.

        Returns:
            The adapter without its tensors, its content hash, their bytes, and whether it was
            trained on this base.

        Raises:
            LorakitError: it can't be used; nothing changes.
        """

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that were accepted with it are answered by it.

        Raises:
            RefusalError: there is none of that name.
        """
        with self._loading:
            if name not in self._loaded:
                raise RefusalError(
                    f"The lora adapter '{name}' cannot be found{did_you_mean(name, self._loaded)}",
                    404,
                    param="lora_name",
                )
            del self._loaded[name]
            self._unloaded.add(name)
            self._drop(name)

    @abstractmethod
    def _drop(self, name: str) -> None:
        """Have an adapter answer no new requests."""

    def choose(
        self,
        model: str | None,
        adapter_id: str | None = None,
        adapters: Sequence[tuple[str, float]] | None = None,
        *,
        check: Callable[[Sequence[str]], None] = lambda names: None,
    ) -> What:
        """What a request names, as it is now.

        Args:
            model: the base, an adapter, or BASE:ADAPTER; None or "": the base.
            adapter_id: an adapter, in the words of LoRAX.
            adapters: several with weights, which are summed.
            check: is called with the adapters' names before it is said whether there are any, or
                one is looked for and loaded; raises where they may not be asked.

        Raises:
            RefusalError: a name is not known, or they contradict each other.
            LorakitError: an adapter was evicted, and its folder is not what it was.
        """
        named, param = self._adapter_of(model), "model"
        if adapter_id:
            if named not in (None, adapter_id):
                raise RefusalError(
                    f"model names {named!r} and adapter_id {adapter_id!r}: give one",
                    param="adapter_id",
                )
            named, param = adapter_id, "adapter_id"
        if adapters is None:
            pairs = [] if named is None else [(named, 1.0)]
        elif named is not None:
            raise RefusalError(
                f"the request names the adapter {named!r}, and adapters too: give one",
                param="adapters",
            )
        else:
            pairs, param = list(adapters), "adapters"
        check([name for name, _ in pairs])
        for name, _ in pairs:
            self._check_known(name, param, check)
        for name, _ in pairs:
            self._resolve(name)
        return self._chosen(named or model or self.name, pairs)

    @abstractmethod
    def _chosen(self, name: str, pairs: Sequence[tuple[str, float]]) -> What:
        """What some adapters and their weights mean now, under the name that was asked for.

        Raises:
            RefusalError: one was unloaded meanwhile, or has no room in memory.
        """

    def find(self, model: str, check: Callable[[Sequence[str]], None]) -> str:
        """The name of the base or of the adapter that a model's name means, loaded if need be.

        Raises:
            RefusalError: it is not known.
            LorakitError: its adapter can't be loaded.
        """
        name = self._adapter_of(model)
        if name is None:
            return self.name
        check([name])
        self._check_known(name, "model", check)
        self._resolve(name)
        return name

    def _resolve(self, name: str) -> None:
        """Load an adapter that is asked for the first time."""
        if name not in self._loaded:
            with self._loading:
                if name not in self._loaded:
                    self._load(name, self.places.resolved(name))

    def _adapter_of(self, model: str | None) -> str | None:
        """The adapter that a model's name means, if there is one; None: the base."""
        if not model or model == self.name:
            return None
        return model if model in self._loaded else model.removeprefix(f"{self.name}:")

    def _check_known(self, name: str, param: str, check: Callable[[Sequence[str]], None]) -> None:
        """Make sure that there is an adapter of a name, or may be.

        Raises:
            RefusalError: there is none; with the names of those that may be asked.
        """
        may_come = name not in self._unloaded and self.places.may_resolve(name)
        if name not in self._loaded and not may_come:
            known = [self.name, *(each for each in self._loaded if _passes(check, each))]
            hint = did_you_mean(name, known) or f". There are: {', '.join(known[:8])}"
            raise RefusalError(f"The model `{name}` does not exist{hint}", 404, param=param)


def _passes(check: Callable[[Sequence[str]], None], name: str) -> bool:
    """Whether an adapter may be asked."""
    try:
        check([name])
    except RefusalError:
        return False
    return True
