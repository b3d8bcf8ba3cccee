"""The names of a front, and the versions of adapters that they mean on the servers behind it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapter.adapter import Adapter
from lorakit.serving.fleet.dialects import Weighted
from lorakit.serving.fleet.fleet import Fleet
from lorakit.serving.fleet.version import Version
from lorakit.serving.names import Names
from lorakit.serving.places import Places
from lorakit.serving.refusals import RefusalError


@dataclass(frozen=True, eq=False)
class Lease:
    """What answers a request, which stays loaded until the request has ended."""

    name: str
    """The name that the answer gives as its model."""
    weighted: Weighted
    fleet: Fleet

    def end(self) -> None:
        """Need it no more."""
        self.fleet.let_go(version for version, _ in self.weighted)


class FleetNames(Names[Lease]):
    """The base and its adapters by name, on other servers.

    Args:
        fleet: the servers.
        name: what requests call the base.
        places: from which adapters may be loaded.
    """

    def __init__(self, fleet: Fleet, name: str, places: Places) -> None:
        super().__init__(name, places)
        self._fleet = fleet
        self._versions: dict[str, Version] = {}

    @property
    def resident(self) -> Collection[str]:
        """The names of those that a server holds which answers."""
        up = [member for member in self._fleet.members if member.is_up]
        held = set[str]().union(*(member.holds for member in up))
        return {name for name, version in list(self._versions.items()) if version.key in held}

    @property
    def resident_bytes(self) -> int:
        """The memory of all copies, as far as the servers tell."""
        return sum(self._loaded[name].size_bytes for name in self.resident if name in self._loaded)

    @property
    def running(self) -> list[str]:
        """The names of the adapters that are answering requests."""
        current = set(self._versions.values())
        in_use = [v.name for v in self._fleet.versions if v.users > (v in current)]
        return list(dict.fromkeys(in_use))

    def _take(self, name: str, folder: Path) -> tuple[Adapter, str, int, str]:
        adapter = Adapter.load(folder)
        size = adapter.size_bytes
        version = self._fleet.take(name, adapter)
        try:
            self._fleet.place(version, adapter)
        except Exception:
            self._fleet.let_go([version])
            raise
        old = self._versions.get(name)
        self._versions[name] = version
        if old is not None:
            self._fleet.let_go([old])
        told = self._fleet.figures(version)
        told_size, base = told.get("size_bytes", size), told.get("base", "unknown")
        return version.record, version.content_hash, told_size, base

    def _drop(self, name: str) -> None:
        self._fleet.let_go([self._versions.pop(name)])

    def _chosen(self, name: str, pairs: Sequence[tuple[str, float]]) -> Lease:
        weighted: list[tuple[Version, float]] = []
        try:
            for each, weight in pairs:
                with self._fleet.lock:
                    version = self._versions[each]
                    self._fleet.use([version])
                weighted.append((version, weight))
        except KeyError as error:
            self._fleet.let_go(version for version, _ in weighted)
            # Unloaded since its name was looked up.
            raise RefusalError(
                f"The model `{error.args[0]}` does not exist", 404, param="model"
            ) from None
        return Lease(name, tuple(weighted), self._fleet)
