"""The bank of adapters: it reads and verifies them, routes rows to them, switches and merges."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.adapter.hub import local_path
from lorakit.adapter.tensor_files import value_problems
from lorakit.attachment.attach import extract, fit_and_build
from lorakit.attachment.state import check_model, is_compiled
from lorakit.bank.entries import Entries, Held, Ready
from lorakit.errors import AdapterFileError, BankError
from lorakit.layers.operation import Update
from lorakit.merging.merge import merge, unmerge
from lorakit.merging.report import MergeReport
from lorakit.models.base import unwrapped
from lorakit.routing.choices import Choice, RowChoices
from lorakit.routing.compiled_model import prepare_for_compile
from lorakit.routing.route import route_rows, switch

SHOWN = 8
"""The adapters that a bank's repr names."""


class AdapterBank:
    """Many verified adapters on one base, chosen for each row of a batch.

    Adapters of any rank, targets, precision and heads live side by side. Loading one never touches
    the others, and a bad one is an error of its own alone. Adapters may be loaded and unloaded in
    one thread while another runs forward passes; routes of several threads wait for each other.

    Where the model is compiled (`torch.compile(model)` or `model.compile()`) before the bank is
    made, neither another route nor other resident adapters compile it again: there is one graph for
    the base, one for a choice for all rows, and one for a choice for each row.

    Args:
        model: the base, plain or with adapters, which the bank then holds too.
        budget_bytes: the most memory that resident adapters may take. Beyond it those go that were
            not used for the longest time; they are read again from their folders when a route names
            them. None: no limit.
        allow_other_base: accept adapters that were trained on other weights.
        check: is called with the updates of each adapter by module path, and the adapter without
            its tensors, before a name means it; raises a LorakitError where it can't be used.

    Examples:
        >>> bank = lk.AdapterBank(model, budget_bytes=500_000_000)
        >>> for task in ("places", "sql"):
        ...     adapter = bank.load(task, f"out/{task}")
        >>> bank.names
        ('places', 'sql')
        >>> batch = tokenizer(["The sea", "The sea"], return_tensors="pt")
        >>> with bank.route(["places", {"places": 0.5, "sql": 0.5}]):
        ...     logits = model(**batch).logits
        >>> bank.switch("sql")  # all rows from now on
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget_bytes: int | None = None,
        allow_other_base: bool = False,
        check: Callable[[Mapping[str, Update], Adapter], None] | None = None,
    ) -> None:
        check_model(model)
        self.model = unwrapped(model)
        self.budget_bytes = budget_bytes
        self._allow_other_base = allow_other_base
        self._check = check
        self._loading = threading.RLock()
        """Held while adapters are loaded or removed."""
        self._routing = threading.RLock()
        """Held by the thread whose route is open."""
        if is_compiled(model):
            prepare_for_compile(model)
        self._entries = Entries(self.model)

    def load(self, name: str, source: AdapterSource, *, revision: str | None = None) -> Adapter:
        """Read an adapter, verify it, and hold it under a name.

        What the name held before is replaced, unless it is the same content. Nothing changes where
        anything is wrong. A second thread that loads meanwhile waits.

        Args:
            name: what routes call it.
            source: its folder or hub id; an `Adapter` from memory is added, as by `add`.
            revision: a branch, tag or commit of the hub's repository.

        Returns:
            The adapter's settings and origin, without tensors.

        Raises:
            AdapterFileError: the files are damaged or do not fit; every problem is listed.
            BankError: there is no room for it, or the name is merged.
        """
        if isinstance(source, Adapter):
            return self.add(name, source)
        folder = local_path(source, revision)
        with self._loading:
            with Adapter.reading(folder) as adapter:
                ready = self._ready(name, adapter, copy=False)
            return self._hold(name, adapter, ready, folder.absolute())

    def add(self, name: str, adapter: Adapter) -> Adapter:
        """Hold an adapter from memory under a name; as it has no folder, it is never evicted.

        Raises:
            AdapterFileError: it does not fit; every problem is listed.
            BankError: there is no room for it, or the name is merged.
        """
        problems = value_problems(adapter.tensors)
        if problems:
            raise AdapterFileError.listing(f"adapter {name!r} can't be used", problems)
        with self._loading:
            return self._hold(name, adapter, self._ready(name, adapter, copy=True), None)

    def unload(self, name: str) -> None:
        """Forget an adapter. A route that uses it now keeps its weights until it ends.

        Raises:
            BankError: it is not known, pinned, merged or switched to.
        """
        with self._loading:
            self._entries.forget(name)

    def pin(self, name: str) -> None:
        """Keep an adapter in memory, whatever the budget needs.

        Raises:
            BankError: it is not known.
        """
        with self._kept([name]):
            self._entries.of(name).pinned = True

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted and unloaded again.

        Raises:
            BankError: it is not known.
        """
        self._entries.of(name).pinned = False

    @property
    def pinned(self) -> tuple[str, ...]:
        """The adapters that stay in memory, whatever the budget needs."""
        return self._entries.pinned

    @property
    def names(self) -> tuple[str, ...]:
        """Every adapter that a route may name, resident or not."""
        return self._entries.names

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters in memory."""
        return self._entries.resident

    def is_resident(self, name: str) -> bool:
        """Whether an adapter is in memory."""
        return self._entries.is_resident(name)

    @property
    def resident_bytes(self) -> int:
        """The memory of the adapters in it."""
        return sum(self.size_bytes(name) for name in self.resident)

    def size_bytes(self, name: str) -> int:
        """The memory of an adapter, resident or not.

        Raises:
            BankError: it is not known.
        """
        return self._entries.of(name).size_bytes

    @property
    def active(self) -> str | None:
        """The adapter that answers for all rows; None: the base, or rows differ."""
        return self._entries.state.route.frame.name

    def __repr__(self) -> str:
        """One line: the adapters, which of them are in memory, and which is in use."""
        resident = set(self.resident)
        shown = [name if name in resident else f"{name} (evicted)" for name in self.names[:SHOWN]]
        shown += [f"… and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        budget = "" if self.budget_bytes is None else f" of {self.budget_bytes / 1e6:,.1f}"
        merged = " (merged)" if self._entries.state.route.merged else ""
        return (
            f"AdapterBank({', '.join(shown) or 'empty'}; {self.resident_bytes / 1e6:,.1f}{budget} "
            f"MB in memory; {self.active or 'the base'}{merged} in use)"
        )

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    @contextmanager
    def route(
        self, names: Choice | Sequence[Choice], *, lengths: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Use one adapter, or one for each row of the batch, inside a block (see `lk.route`).

        Evicted adapters are read again first, and none that the route uses is evicted meanwhile.

        Args:
            names: for all rows or for each: a name, None for the base, or names with weights, as
                in {"e2e": 0.7, "style": 0.3}.
            lengths: the batch is one row of several requests with so many tokens each, and there is
                a choice for each of them.

        Raises:
            RouteError: a name is not known, an adapter is merged, or the batch has another number
                of rows.
            BankError: the adapters of this route alone are beyond the budget.
            AdapterFileError: an evicted adapter's folder is not what it was.
        """
        with self._routing:
            choices = RowChoices.of(names, dict.fromkeys(self._entries.names))
            with self._kept(choices.names), route_rows(self.model, choices, lengths=lengths):
                yield

    def hold(self, name: str) -> Held:
        """What a name means now; it is read again first if it was evicted.

        Whoever has it may go on with it after the name is unloaded, evicted or means another.

        Raises:
            BankError: it is not known, or there is no room for it.
            AdapterFileError: an evicted adapter's folder is not what it was.
        """
        with self._entries.lock:
            self._entries.note_use(name)
            if self._entries.is_resident(name):
                return self._entries.held(name)
        # Nothing is evicted while this lock is taken, so it needs no place of its own beyond that:
        # many who hold at once never leave each other without room.
        with self._loading:
            self._ensure_resident([name])
            return self._entries.held(name)

    def switch(self, name: str | None) -> None:
        """Make one adapter, or with None the base, answer for all rows from now on.

        Raises:
            BankError: it is not known, or there is no room for it.
            MergeError: another adapter is merged into the weights.
        """
        with self._routing:
            with self._entries.lock:
                if name is None or self._entries.is_resident(name):
                    if name is not None:
                        self._entries.note_use(name)
                    return switch(self.model, name)
            with self._kept([name]):
                return switch(self.model, name)

    def merge(self, name: str, *, measure: bool = False) -> MergeReport:
        """Merge an adapter into the weights, in place of another if one is merged.

        The bits are those of a fresh merge: each weight is computed from the original one.

        Args:
            name: the adapter.
            measure: compute what rounding cost, which takes several times longer.

        Raises:
            BankError: it is not known.
            MergeError: it is merged already.
        """
        with self._routing, self._loading, self._kept([name]):
            return merge(self.model, name, measure=measure)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit.

        Raises:
            MergeError: nothing is merged.
        """
        with self._routing, self._loading:
            unmerge(self.model)

    def _ready(self, name: str, adapter: Adapter, *, copy: bool) -> Ready | None:
        """Verify an adapter and make its updates; None if the name holds this content already."""
        held = self._entries.is_resident(name)
        # Training may have changed it since it was loaded.
        if held and extract(self.model, name).content_hash() == adapter.content_hash():
            return None
        if self._entries.state.route.merged == name:
            raise BankError(f"adapter {name!r} is merged: bank.unmerge(), then replace it")
        return self._updates_of(adapter, copy=copy)

    def _hold(
        self, name: str, adapter: Adapter, ready: Ready | None, folder: Path | None
    ) -> Adapter:
        """Make an adapter resident under a name."""
        if ready is not None:
            self._make_room(name, adapter.size_bytes)
        self._entries.put(
            name,
            ready,
            content_hash=adapter.content_hash(),
            size_bytes=adapter.size_bytes,
            folder=folder,
        )
        return self._entries.held(name).record

    def _updates_of(self, adapter: Adapter, *, copy: bool) -> Ready:
        _, updates, record = fit_and_build(
            self.model,
            adapter,
            allow_other_base=self._allow_other_base,
            other_heads=True,
            copy=copy,
        )
        if self._check is not None:
            self._check(updates, record)
        return updates, record

    @contextmanager
    def _kept(self, names: Sequence[str]) -> Iterator[None]:
        """Read again those adapters that were evicted, and evict none of them inside a block.

        Raises:
            BankError: one is not known, or there is no room for them.
        """
        with self._entries.in_use(names):
            self._ensure_resident(names)
            yield

    def _ensure_resident(self, names: Sequence[str]) -> None:
        if all(map(self._entries.is_resident, names)):
            return
        with self._loading:
            for name in names:
                if not self._entries.is_resident(name):
                    self._reload(name)

    def _reload(self, name: str) -> None:
        entry = self._entries.of(name)
        if entry.folder is None:
            raise BankError(f"adapter {name!r} was detached and has no folder: bank.add it again")
        adapter = Adapter.load(entry.folder)
        if adapter.content_hash() != entry.content_hash:
            raise AdapterFileError(
                f"{entry.folder} holds another adapter than when {name!r} was loaded from it: "
                f"bank.load({name!r}, ...) takes the new one"
            )
        ready = self._updates_of(adapter, copy=False)
        self._make_room(name, entry.size_bytes)
        self._entries.install(name, ready)

    def _make_room(self, name: str, size_bytes: int) -> None:
        if self.budget_bytes is not None:
            self._entries.make_room(name, size_bytes, self.budget_bytes)
