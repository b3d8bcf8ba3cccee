"""An adapter's content, under a name that no other content has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse

HASH_LENGTH = 16
"""The characters of a content hash that a name on another server has."""


@dataclass(eq=False)
class Version:
    """An adapter as it was when its folder was read."""

    name: str
    """What requests call it."""
    content_hash: str
    folder: Path
    record: Adapter
    """Its settings, origin and training card, without tensors."""
    users: int = 0
    """The requests and names that need it; without any, it is unloaded."""

    @property
    def key(self) -> str:
        """Its name on other servers: what answers to it can't be anything else."""
        return f"{self.name}@{self.content_hash[:HASH_LENGTH]}"

    @property
    def trained(self) -> TrainedUse:
        """How it was trained."""
        return TrainedUse.on(self.record.card)
