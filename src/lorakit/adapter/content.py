"""The content of an adapter: its settings, its named tensors, and where they came from."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.adapter.site import Site
from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.models.identity import BaseIdentity
from lorakit.models.loftq import LoftQ
from lorakit.upstream.private_names import write_count

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by size in bytes, to read the bits of any tensor; numpy has no bfloat16."""
LUMP_BYTES = 16 * 2**20
"""Bytes hashed at once: other threads can run while hashlib reads a large buffer."""


def _joined(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes in lumps of `LUMP_BYTES` or a little more, the last one shorter."""
    lump: list[bytes | memoryview] = []
    size_bytes = 0
    for piece in pieces:
        lump.append(piece)
        size_bytes += memoryview(piece).nbytes
        if size_bytes >= LUMP_BYTES:
            yield b"".join(lump)
            lump, size_bytes = [], 0
    yield b"".join(lump)


def _bits(tensor: Tensor) -> memoryview:
    """A tensor's bits as one contiguous buffer: the tensor's own memory where it is contiguous."""
    return np.ascontiguousarray(tensor.detach().view(INTEGERS[tensor.itemsize]).numpy()).data


@dataclass(frozen=True, kw_only=True)
class AdapterContent:
    """The fields of an `Adapter`: what was trained, independent of any model and any file.

    The modules that read and write files use this class; `Adapter` adds `save` and `load`.
    """

    configs: tuple[MethodConfig, ...]
    """The settings of each method that it was made with."""
    sites: tuple[Site, ...]
    """Every low-rank update, in the model's order."""
    tensors: Mapping[str, Tensor]
    """The weights, on the CPU."""
    copied_modules: tuple[str, ...] = ()
    """Paths of the modules saved in full: a classifier head, for example."""
    target_modules: tuple[str, ...] = ()
    """Shortest module names that select exactly the adapted layers, for PEFT's configuration."""
    base: BaseIdentity | None = None
    """The base it was trained on, where known."""
    loftq: LoftQ | None = None
    """How PEFT's LoftQ changed the layers of that base before training; None: it did not."""
    card: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained: data, seed, steps, versions, scores."""
    unverified: tuple[str, ...] = ()
    """What its files could not prove, in words; empty if lorakit trained it."""

    @property
    def method(self) -> str:
        """The names of its methods, with a plus between them."""
        return "+".join(config.method for config in self.configs)

    @property
    def base_name(self) -> str:
        """The name of its base: by the base's sketch, else by PEFT's settings; "": unknown."""
        name = self.base.name if self.base else self.card.get("base_model")
        return name if isinstance(name, str) else ""

    @property
    def lora(self) -> LoRAConfig | None:
        """The settings of its low-rank updates, if LoRA is among its methods."""
        return next((each for each in self.configs if isinstance(each, LoRAConfig)), None)

    @property
    def loftq_forms(self) -> dict[str, str]:
        """What made the weight of each layer that LoftQ changed; empty: the base is as it was."""
        ranks = {site.path: site.rank for site in self.sites}
        return {} if self.loftq is None else self.loftq.forms(ranks)

    @property
    def size_bytes(self) -> int:
        """The memory of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """The number of trained values."""
        fixed_a = self.lora is not None and self.lora.freeze_a
        total = sum(tensor.numel() for tensor in self.tensors.values())
        for site in self.sites:
            a, b = (self.tensors[f"{site.name}.lora_{end}"].numel() for end in "ab")
            if site.tied_to is not None:
                total -= a + b
                continue
            total -= (a if fixed_a else a * site.frozen // site.rank) + b * site.frozen // site.rank
        return total

    def __repr__(self) -> str:
        """One line: methods, updates, size, precision and base; tensors are too long to print."""
        ranks = sorted({site.rank for site in self.sites})
        rank = f" r {'/'.join(map(str, ranks))}" if ranks else ""
        updates = f", {len(self.sites)} updates" if self.sites else ""
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()})
        size = f"{self.parameters:,} parameters in {'/'.join(dtypes)}" if dtypes else "no tensors"
        base = f", base {self.base.name or 'unnamed'}" if self.base else ""
        return f"{type(self).__name__}({self.method}{rank}{updates}, {size}{base})"

    def content_hash(self) -> str:
        """The SHA-256 of all that changes the output: tensors, sites and scales."""
        # Kept until a tensor is written to, because a bank asks for what loading has computed.
        tensors = list(self.tensors.values())
        # Torch counts no writes to what was made in inference mode: NaN differs from itself.
        versions = [math.nan if t.is_inference() else write_count(t) for t in tensors]
        kept = self.__dict__.get("_hashed")
        if kept is None or kept[1] != versions or any(map(operator.is_not, kept[0], tensors)):
            kept = self.__dict__["_hashed"] = (tensors, versions, self._compute_hash())
        return str(kept[2])

    def keep_hash_of(self, other: AdapterContent) -> None:
        """Keep the hash that was computed of another object with the same tensors and settings."""
        if "_hashed" in other.__dict__:
            self.__dict__["_hashed"] = other.__dict__["_hashed"]

    def _compute_hash(self) -> str:
        digest = hashlib.sha256()
        for lump in _joined(self._hashed_bytes()):
            digest.update(lump)
        return digest.hexdigest()

    def _hashed_bytes(self) -> Iterator[bytes | memoryview]:
        for name, tensor in sorted(self.tensors.items()):
            # As json.dumps writes the three in a list, in half the time.
            yield f'[{json.dumps(name)}, "{tensor.dtype}", {list(tensor.shape)}]'.encode()
            yield _bits(tensor)
        for site in sorted(self.sites, key=lambda site: site.name):
            meaning = [site.name, site.rank, site.alpha, site.scale, site.rows, site.groups]
            yield json.dumps([*meaning, *([site.frozen] if site.frozen else [])]).encode()
        yield json.dumps(sorted(self.copied_modules)).encode()
        if self.lora is not None and self.lora.trainable_token_indices:
            yield json.dumps(self.lora.trainable_token_indices, sort_keys=True).encode()
        if self.lora is not None and self.lora.layer_replication:
            yield json.dumps(self.lora.layer_replication).encode()
        if self.loftq is not None:
            yield json.dumps(["loftq", self.loftq.bits, self.loftq.iterations]).encode()
        for config in self.configs:
            if not isinstance(config, LoRAConfig):
                yield json.dumps([config.method, config.model_dump(mode="json")]).encode()
