"""An adapter's content, under a name that no other content has."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.peft import layers_of, reasons_against

HASH_LENGTH = 16
"""The characters of a content hash that a name on another server has."""


@dataclass(eq=False)
class Version:
    """An adapter as it was when its folder was read."""

    name: str
    """What requests call it."""
    content_hash: str
    copy: Path
    """A folder with this content, which stays as it is while a server may read it."""
    record: Adapter
    """Its settings, origin and training card, without tensors."""
    obstacles: tuple[str, ...] = ()
    """Why vLLM can't serve it."""
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


def version_of(name: str, adapter: Adapter, copies: Path) -> Version:
    """The version of an adapter, whose copy is still to be made.

    Args:
        name: what requests call it.
        adapter: with its tensors.
        copies: the folder of copies.
    """
    content_hash = adapter.content_hash()
    return Version(
        name,
        content_hash,
        copies / content_hash,
        replace(adapter, tensors={}),
        tuple(vllm_obstacles(adapter)),
    )


def vllm_obstacles(adapter: Adapter) -> list[str]:
    """What of an adapter vLLM leaves out, or refuses when the first request comes.

    It reads PEFT's two files, with one rank and one scale for all layers.
    """
    found = []
    if adapter.lora is not None and adapter.lora.use_dora:
        found.append("it is DoRA")
    if adapter.lora is not None and (adapter.lora.bias != "none" or adapter.lora.lora_bias):
        found.append("it has trained biases")
    if adapter.lora is not None and adapter.lora.trainable_token_indices:
        found.append("it has trained rows of tokens")
    if adapter.lora is not None and adapter.lora.layer_replication:
        found.append(f"its base repeats blocks ({adapter.lora.layer_replication})")
    if adapter.loftq is not None:
        found.append(f"LoftQ ({adapter.loftq}) changed the weights of its base")
    if adapter.copied_modules:
        found.append(f"it has modules of its own ({', '.join(adapter.copied_modules)})")
    task = adapter.card.get("task")
    if task not in (None, "generation"):
        found.append(f"it does {task}")
    reasons = reasons_against(adapter)
    if reasons:
        return [*found, f"PEFT has no exact form for it ({reasons[0]})"]
    layers = layers_of(adapter)
    ranks = sorted({layer.rank for layer in layers})
    if len(ranks) > 1:
        found.append(f"its layers have different ranks ({', '.join(map(str, ranks))})")
    elif len({layer.scale for layer in layers}) > 1:
        found.append("its layers have different scales")
    kinds = sorted({site.kind for site in adapter.sites} - {"linear", "transposed"})
    if kinds:
        found.append(f"it adapts layers of another kind ({', '.join(kinds)})")
    return found
