"""What a bank's names mean, which of its adapters are in memory, and which of them go first."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import install, remove
from lorakit.attachment.state import Attachment, attachment_for, attachment_of
from lorakit.errors import BankError, did_you_mean
from lorakit.layers.operation import Update

Ready = tuple[Mapping[str, Update], Adapter]
"""An adapter's updates by module path, verified, and the adapter without its tensors."""


@dataclass
class BankEntry:
    """One adapter of a bank."""

    content_hash: str
    """`Adapter.content_hash()`; empty for one that came by lk.attach."""
    size_bytes: int
    """Memory of its tensors."""
    folder: Path | None
    """The folder from which it is read again after an eviction; None: it was added from memory, and
    is never evicted."""
    pinned: bool = False
    routes: int = 0
    """The number of routes that use it now."""
    used: int = 0
    """The number of its last use, counted over all adapters."""


@dataclass(frozen=True, eq=False)
class Held:
    """An adapter as a name meant it at one moment, whatever the name means later."""

    name: str
    content_hash: str
    """`Adapter.content_hash()`; empty for one that came by lk.attach."""
    record: Adapter
    """Its settings, origin and training card, without tensors."""
    updates: Mapping[int, Update]
    """By the layer's number."""


class Entries:
    """The adapters of a bank by name: those in memory, and those that were evicted from it.

    Which are in memory the model knows. `lock` is held for moments, by these methods, and by a
    caller for whom several of them are to be of one moment.

    Args:
        model: the base, without wrappers. Adapters that it has are entries from the start, and
            those that it gets by lk.attach from the next look on.
    """

    def __init__(self, model: nn.Module) -> None:
        self.lock = threading.RLock()
        self._model = model
        self._attachment = attachment_for(model)
        self._by_name: dict[str, BankEntry] = {}
        self._uses = 0
        self._notice()

    @property
    def state(self) -> Attachment:
        """What the model knows of its adapters.

        Raises:
            BankError: the model was detached from them.
        """
        if attachment_of(self._model) is not self._attachment:
            raise BankError("the model was detached from this bank's adapters: make a new bank")
        return self._attachment

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that has an entry, resident or not."""
        self._notice()
        return tuple(self._by_name)

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters in memory."""
        return tuple(name for name in self.names if self.is_resident(name))

    @property
    def pinned(self) -> tuple[str, ...]:
        """The adapters that are never evicted."""
        return tuple(name for name, entry in list(self._by_name.items()) if entry.pinned)

    def is_resident(self, name: str) -> bool:
        """Whether an adapter is in memory; one that lk.detach took out is not."""
        return name in self.state.adapters

    def of(self, name: str) -> BankEntry:
        """The entry of an adapter.

        Raises:
            BankError: it is not known.
        """
        with self.lock:
            if name not in self._by_name:
                self._notice()
            if name not in self._by_name:
                raise BankError(
                    f"the bank has no adapter {name!r}{did_you_mean(name, self._by_name)}; "
                    f"it has: {', '.join(self._by_name) or 'none'}"
                )
            return self._by_name[name]

    def held(self, name: str) -> Held:
        """What the name of a resident adapter means now."""
        with self.lock:
            attached = self.state.adapters[name]
            return Held(name, self.of(name).content_hash, attached.record, attached.updates)

    def note_use(self, name: str) -> None:
        """Note that an adapter is used now, so that others go before it.

        Raises:
            BankError: it is not known.
        """
        with self.lock:
            self._uses += 1
            self.of(name).used = self._uses

    @contextmanager
    def in_use(self, names: Sequence[str]) -> Iterator[None]:
        """Evict none of some adapters inside a block.

        Raises:
            BankError: one is not known.
        """
        with self.lock:
            entries = [self.of(name) for name in names]
            for name, entry in zip(names, entries, strict=True):
                entry.routes += 1
                self.note_use(name)
        try:
            yield
        finally:
            with self.lock:
                for entry in entries:
                    entry.routes -= 1

    def put(
        self,
        name: str,
        ready: Ready | None,
        *,
        content_hash: str,
        size_bytes: int,
        folder: Path | None,
    ) -> None:
        """Have a name mean an adapter from now on, which is then resident and was used last.

        Args:
            name: of the adapter.
            ready: what makes it resident; None: it is that already, as by lk.attach.
            content_hash: of the adapter.
            size_bytes: of its tensors.
            folder: from which it is read again after an eviction; None: it is never evicted.
        """
        with self.lock:
            if ready is not None:
                self.install(name, ready)
            entry = self._by_name.setdefault(name, BankEntry("", 0, None))
            entry.content_hash, entry.size_bytes = content_hash, size_bytes
            entry.folder = folder
            self.note_use(name)

    def install(self, name: str, ready: Ready) -> None:
        """Make an adapter resident under its name."""
        updates, record = ready
        with self.lock:
            install(self._model, updates, name, record, trainable=False)

    def forget(self, name: str) -> None:
        """Take an adapter's entry out, and it itself out of memory.

        Raises:
            BankError: it is not known, pinned, merged or switched to.
        """
        with self.lock:
            if self.of(name).pinned:
                raise BankError(f"adapter {name!r} is pinned: bank.unpin({name!r}) first")
            route = self.state.route
            if route.merged == name:
                raise BankError(f"adapter {name!r} is merged: bank.unmerge(), then unload it")
            if route.bottom.name == name:
                raise BankError(
                    f"adapter {name!r} is switched to: bank.switch(None), then unload it"
                )
            del self._by_name[name]
            if self.is_resident(name):
                remove(self.state, name)

    def make_room(self, name: str, size_bytes: int, budget_bytes: int) -> None:
        """Evict what was not used for the longest time, until an adapter has room.

        Args:
            name: of the adapter; what it holds already leaves its room to what it is to hold.
            size_bytes: of the adapter.
            budget_bytes: the most memory that all resident adapters may take.

        Raises:
            BankError: it has not, whatever may be evicted; nothing is evicted then.
        """
        with self.lock:
            others = {n: self._by_name[n] for n in self.resident if n != name}
            missing = size_bytes + sum(e.size_bytes for e in others.values()) - budget_bytes
            leaving = []
            for other in sorted(others, key=lambda n: others[n].used):
                if missing <= 0:
                    break
                if self._is_evictable(other, others[other]):
                    leaving.append(other)
                    missing -= others[other].size_bytes
            if missing > 0:
                kept = [n for n in others if n not in leaving]
                raise BankError(
                    f"adapter {name!r} takes {size_bytes:,} bytes, and the budget of "
                    f"{budget_bytes:,} is {missing:,} too small for it"
                    + (f" beside {', '.join(kept)}, which can't go now" if kept else "")
                )
            for other in leaving:
                remove(self.state, other)

    def _is_evictable(self, name: str, entry: BankEntry) -> bool:
        held = entry.pinned or entry.routes or name == self.state.route.bottom.name
        return entry.folder is not None and not held

    def _notice(self) -> None:
        """Add entries for adapters that came by lk.attach."""
        with self.lock:
            for name, each in self.state.adapters.items():
                if name not in self._by_name:
                    updates = each.updates.values()
                    size = sum(p.nbytes for update in updates for p in update.parameters())
                    self._by_name[name] = BankEntry("", size, None)
