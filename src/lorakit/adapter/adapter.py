"""An adapter: configuration, named tensors, and where they came from."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lorakit.config.methods import LoRAConfig, MethodConfig
from lorakit.models.identity import BaseIdentity

Rows = tuple[tuple[int, int], ...]
"""Half-open ranges (start, stop) of a fused layer's output rows."""
Kind = Literal["linear", "transposed", "embedding", "conv"]
"""How a layer holds its matrix; transposed: (d_in, d_out), as transformers' Conv1D does."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One low-rank update: where it sits, how wide it is, and how it is scaled."""

    path: str
    """Dotted path of the module in the base model."""
    rank: int
    """Inner width r, with the ranks that do not train."""
    alpha: float
    """Numerator of the scale."""
    scale: float
    """What B·A·x is multiplied by: α/r, or α/√r."""
    role: str | None = None
    """The role, where the site is a slice of a fused layer; None for a whole layer."""
    rows: Rows | None = None
    """Output rows of the slice; None for a whole layer."""
    groups: int = 1
    """Groups of a convolution, which share A; 1 for every other layer."""
    kind: Kind = "linear"
    """What the layer is; other tools' files depend on it, the update does not."""
    layer_rows: int | None = None
    """Output rows of the whole layer, where the site is a slice of it."""
    frozen: int = 0
    """How many of the ranks do not train, counted from the end (PiSSA)."""

    @property
    def name(self) -> str:
        """Return the path, with the role in brackets for a slice."""
        return self.path if self.rows is None else f"{self.path}[{self.role}]"


WORDS = {"lora": ".lora_", "prefix-": ".prompt", "adapter-": ".bottleneck."}
"""How methods' names start, and what is in the names of their tensors."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size in bytes: what any value's bits can be read as; numpy has no bfloat16."""
LUMP_BYTES = 16 * 2**20
"""Other threads go on while hashlib reads, so it is given a lot at once."""


def _joined(pieces: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Yield the same bytes in lumps of `LUMP_BYTES` or a little more, the last one shorter."""
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
    """Return a tensor's bits in one piece, in the tensor's own memory where that is possible."""
    return np.ascontiguousarray(tensor.detach().view(INTEGERS[tensor.itemsize]).numpy()).data


def scale_of(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """Return the factor on B·A: α/r (section 4.1), or α/√r (Kalajdzievski 2023)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What was trained, apart from any model and any file format.

    Tensors are named `<site>.lora_a` (rank, d_in) and `<site>.lora_b` (d_out, rank), and with DoRA
    `<site>.lora_magnitude` (d_out,). A tensor under one of the base's own parameter names replaces
    that parameter (docs/design.md has all shapes).
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
    card: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained: data, seed, steps, versions, scores."""
    unverified: tuple[str, ...] = ()
    """What its files could not prove, in words; empty if lorakit trained it."""

    @property
    def method(self) -> str:
        """Return the names of its methods, with a plus between them."""
        return "+".join(config.method for config in self.configs)

    @property
    def lora(self) -> LoRAConfig | None:
        """Return the settings of its low-rank updates, if LoRA is among its methods."""
        return next((each for each in self.configs if isinstance(each, LoRAConfig)), None)

    def method_of(self, tensor: str) -> str:
        """Return the method that trains a tensor; copies of a task's head go with the first."""
        named = [config.method for config in self.configs]
        for start, word in WORDS.items():
            own = [method for method in named if method.startswith(start)]
            if own and word in tensor:
                return own[0]
        if any(tensor.startswith(f"{path}.") for path in self.copied_modules):
            likely = ["full", "top-k"]
            if any(part.isdecimal() for part in tensor.split(".")):  # in a block, so no head
                likely += [name for name in named if name.startswith("adapter-")]  # trained norms
        elif tensor.endswith(".bias"):
            likely = ["full", "bitfit", "lora"]
        else:
            likely = ["full", "top-k", "bitfit"]  # what the model reads without calling a layer
        return next((method for method in likely if method in named), named[0])

    @property
    def size_bytes(self) -> int:
        """Return the memory of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Return the number of trained values."""
        fixed_a = self.lora is not None and self.lora.freeze_a
        total = sum(tensor.numel() for tensor in self.tensors.values())
        for site in self.sites:
            a, b = (self.tensors[f"{site.name}.lora_{end}"].numel() for end in "ab")
            total -= (a if fixed_a else a * site.frozen // site.rank) + b * site.frozen // site.rank
        return total

    def content_hash(self) -> str:
        """Return the SHA-256 of all that changes the output: tensors, sites and scales."""
        # Kept until a tensor is written to, because a bank asks for what loading has computed.
        tensors = list(self.tensors.values())
        # Torch counts no writes to what was made in inference mode: NaN differs from itself.
        versions = [math.nan if t.is_inference() else t._version for t in tensors]
        kept = self.__dict__.get("_hashed")
        if kept is None or kept[1] != versions or any(map(operator.is_not, kept[0], tensors)):
            kept = self.__dict__["_hashed"] = (tensors, versions, self._compute_hash())
        return str(kept[2])

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
        for config in self.configs:
            if not isinstance(config, LoRAConfig):
                yield json.dumps([config.method, config.model_dump(mode="json")]).encode()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the adapter as a folder (docs/adapter-format.md) and return the folder.

        The folder appears whole or not at all; it is read back before it gets its name.

        Raises:
            OutputError: the folder exists and `overwrite` is false, or cannot be written.
            AdapterFileError: a tensor is not finite.
        """
        # The formats know Adapter, so Adapter can only know them once both are loaded.
        from lorakit.adapter.folder import save_folder

        return save_folder(self, Path(folder), overwrite=overwrite)

    @staticmethod
    def load(
        path: str | Path,
        *,
        config: LoRAConfig | None = None,
        kernel_sizes: Mapping[str, int] | None = None,
    ) -> Adapter:
        """Read an adapter folder of lorakit or PEFT, or a loralib .pt file.

        Args:
            path: the folder, or the .pt file.
            config: rank, alpha and targets, for a loralib file, which does not hold them.
            kernel_sizes: the convolutions in a loralib file, by path or the end of it, and the size
                of their square kernels; the file does not tell them from other layers.

        Raises:
            AdapterFileError: every problem of the files in one message.
        """
        from lorakit.adapter.folder import load_path

        return load_path(Path(path), config=config, kernel_sizes=kernel_sizes)
