"""The servers behind a front: which of them holds what, and which answers a request."""

from __future__ import annotations

import itertools
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.errors import ConfigError, LorakitError
from lorakit.serving.fleet.dialects import Weighted
from lorakit.serving.fleet.member import DownError, Member, Patience
from lorakit.serving.fleet.version import Version, version_of
from lorakit.serving.refusals import RefusalError

RETRY_AFTER_S = 5


class Fleet:
    """Several servers with the same base.

    Args:
        urls: where they are.
        keys: those that they ask for, by URL.
        copies_in: a folder that they and this process see, for copies of adapters.
        holders: how many of them hold each adapter; None: all.
        patience: how long they are waited for.
        note: is called with what happens to them.

    Raises:
        ConfigError: none of them answers, or they have different bases.
    """

    def __init__(
        self,
        urls: Sequence[str],
        keys: Mapping[str, str],
        *,
        copies_in: Path,
        holders: int | None = None,
        patience: Patience | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._copies_in, self._holders = copies_in, holders or len(urls)
        self._note = note
        self.lock = threading.RLock()
        """Held for moments: to count users and to choose a member."""
        self._versions: dict[str, Version] = {}
        self._turns = itertools.count(1)
        self._bases: dict[str, str] = {}
        """What stands for the base's weights, by the kind of server."""
        self.members = [
            Member(url, keys.get(url), patience or Patience(), accept=self._accept, note=note)
            for url in urls
        ]
        for member in self.members:
            member.look()
        if not any(member.is_up for member in self.members):
            reasons = [f"{member.url}: {member.reason}" for member in self.members]
            for member in self.members:
                member.close()
            raise ConfigError.listing("no upstream server can answer", reasons)
        for member in self.members:
            member.watch()

    @property
    def first(self) -> Member:
        """One that answers, or else one that did."""
        known = [member for member in self.members if member.base]
        return next((member for member in known if member.is_up), known[0])

    def close(self, *, unload: bool = True) -> None:
        """Look after the members no more.

        Args:
            unload: have them forget what they were told to load first, which they may take a while
                for.
        """
        for version in self.versions if unload else ():
            version.users = 0
            self._forget(version)
        for member in self.members:
            member.close()
        shutil.rmtree(self._copies_in, ignore_errors=True)

    def _accept(self, member: Member) -> None:
        """Let a member answer, once it holds what it should.

        Raises:
            RefusalError: its base is not that of the others.
        """
        with self.lock:
            known = self._bases.setdefault(member.dialect.name, member.base_hash)
        if known != member.base_hash:
            raise RefusalError(
                f"its base, {member.base}, has other weights than that of the others"
            )
        for version in self.versions:
            if not version.users:
                member.drop(version)
                self._tidy(version)
            elif self._wants(member, version):
                try:
                    member.hold(version)
                except RefusalError as error:
                    self._note(f"{member.url}: {version.name} can't be loaded again: {error}")

    def _wants(self, member: Member, version: Version) -> bool:
        holders = [each for each in self.members if each.is_up and version.key in each.holds]
        return len(holders) < self._holders and not member.dialect.problems(version)

    def take(self, name: str, adapter: Adapter) -> Version:
        """The version of an adapter, with one user more."""
        made = version_of(name, adapter, self._copies_in)
        with self.lock:
            version = self._versions.setdefault(made.key, made)
            version.users += 1
            return version

    def use(self, versions: Iterable[Version]) -> None:
        """Have versions stay while one user more needs them."""
        with self.lock:
            for version in versions:
                version.users += 1

    def let_go(self, versions: Iterable[Version]) -> None:
        """End a use; what nobody needs any more is unloaded, soon."""
        with self.lock:
            for version in versions:
                version.users -= 1
                if version.users == 0:
                    self._forget(version)

    def _forget(self, version: Version) -> None:
        for member in self.members:
            member.do(lambda member=member: self._drop(member, version))  # type: ignore[misc]

    def _drop(self, member: Member, version: Version) -> None:
        with member.admin:
            # It may be wanted again: who wants it waits for this lock to have it loaded. A server
            # that is down is told when it is there again.
            if version.users == 0 and member.is_up:
                member.drop(version)
        self._tidy(version)

    def _tidy(self, version: Version) -> None:
        """Forget a version that nobody needs or holds, and its copy if no other name has it."""
        with self.lock:
            if version.users or any(version.key in each.holds for each in self.members):
                return
            self._versions.pop(version.key, None)
            if not any(each.copy == version.copy for each in self.versions):
                shutil.rmtree(version.copy, ignore_errors=True)

    def place(self, version: Version, adapter: Adapter) -> None:
        """Have as many members as should hold an adapter.

        Args:
            version: of it, which somebody needs.
            adapter: the same with its tensors.

        Raises:
            RefusalError: no member can serve it, or one that should does not take it.
            OutputError: its copy can't be written.
        """
        able = self._able([(version, 1.0)])
        if not version.copy.is_dir():
            # What is in its own folder may change, and vLLM reads adapters again and again.
            adapter.save(version.copy)
        order = sorted(able, key=lambda m: (version.key not in m.holds, len(m.holds), m.busy))
        placed = 0
        for member in order:
            if placed == self._holders:
                break
            try:
                member.hold(version)
            except DownError as error:
                member.fail(str(error))
                continue
            placed += 1
        if not placed:
            raise _nobody(self.members)

    def _able(self, weighted: Weighted, but_not: Collection[Member] = ()) -> list[Member]:
        """The members that answer and can do so with these weights.

        Raises:
            RefusalError: there are none; says why.
        """
        up = [member for member in self.members if member.is_up and member not in but_not]
        if not up:
            raise _nobody(self.members)
        able, problems = [], dict[str, None]()
        for member in up:
            found = [why for v, _ in weighted for why in member.dialect.problems(v)]
            try:
                member.dialect.check(weighted)
            except RefusalError as error:
                found.append(str(error))
            problems |= dict.fromkeys(found)
            if not found:
                able.append(member)
        if not able:
            named = ", ".join(version.name for version, _ in weighted)
            raise RefusalError(
                f"no server that answers can serve {named}, since they are vLLM servers: "
                + "; ".join(problems)
            )
        return able

    def holder(self, weighted: Weighted, but_not: Collection[Member] = ()) -> Member | None:
        """The least busy member that holds these adapters, with one request more; None: none does.

        Raises:
            RefusalError: no member can serve them.
        """
        with self.lock:
            keys = {version.key for version, _ in weighted}
            able = [m for m in self._able(weighted, but_not) if keys <= m.holds]
            found = min(able, key=_turn, default=None)
            return None if found is None else self._given(found)

    def bring(self, weighted: Weighted, but_not: Collection[Member] = ()) -> Member:
        """The least busy member, which is made to hold these adapters, with one request more.

        Raises:
            RefusalError: no member can serve them, or it does not take one.
        """
        tried = set(but_not)
        while True:
            member = min(self._able(weighted, tried), key=_turn)
            try:
                for version, _ in weighted:
                    member.hold(version)
            except DownError as error:
                member.fail(str(error))
                tried.add(member)
            except RefusalError as error:
                # It took the adapter once, so that the client has asked nothing wrong.
                raise RefusalError(str(error), 503) from None
            else:
                with self.lock:
                    return self._given(member)

    def _given(self, member: Member) -> Member:
        member.busy += 1
        member.answered += 1
        member.turn = next(self._turns)
        return member

    def release(self, member: Member) -> None:
        """End a request of a member."""
        with self.lock:
            member.busy -= 1

    @property
    def versions(self) -> list[Version]:
        """All that is loaded, or about to be loaded or unloaded."""
        return list(self._versions.values())

    def figures(self, version: Version) -> dict[str, Any]:
        """What a member that holds an adapter tells of it."""
        for member in self.members:
            if member.is_up and version.key in member.holds:
                try:
                    return member.figures(version)
                except LorakitError:
                    continue
        return {}


def _turn(member: Member) -> tuple[int, int]:
    """The least busy first, and of equally busy ones, that which was asked the longest ago."""
    return member.busy, member.turn


def _nobody(members: Sequence[Member]) -> RefusalError:
    reasons = "; ".join(f"{m.url}: {m.reason}" for m in members if not m.is_up) or "all are busy"
    return RefusalError(f"no upstream server answers: {reasons}", 503, retry_after_s=RETRY_AFTER_S)
