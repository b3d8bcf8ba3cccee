"""Reading loralib's files, saved from `lora_state_dict`: A and B by module path, and nothing else.

loralib reshapes a convolution's B·A into the kernel: with A (r·k, c_in·k) and B (c_out·k, r·k),
ΔW = (B·A).view(c_out, c_in, k, k). An output channel is k rows of B·A, so its ΔW is k blocks, each
a row of B times the whole of A. That equals lorakit's convolution of rank r·k·k whose A is
loralib's, k times along the diagonal, and whose B has the k rows of each channel side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.other_tools import tool_of
from lorakit.adapter.peft_read import EMBEDDINGS
from lorakit.adapter.site import Site, scale_of
from lorakit.adapter.tensor_files import read_pickle, value_problems
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError

SLICES = ("q", "k", "v")
"""Slices of a MergedLinear, which divide its rows equally."""
FUSED = ("c_attn", "in_proj", "qkv", "qkv_proj", "query_key_value")
"""Names of layers that can be a MergedLinear with one slice enabled."""
UNPROVEN = (
    "the base: loralib does not name it",
    "the weights: there is no hash, so that a change of them would not be noticed",
    "rank, alpha and targets: they are those of the given config; the file holds none",
    "which rows the slices are: q, k, v are taken as equal thirds, enabled as the targets say",
    "which layers are embeddings: it is told by their names, and matters for PEFT's files alone",
)
UNPROVEN_BIASES = "which biases were trained: those that are in the file, and it may hold some only"
UNPROVEN_KERNELS = "which layers are convolutions, and their kernels: they are as kernel_sizes says"

_LISTED_LAYERS = 20
_ENDS = (".lora_A", ".lora_B")
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A and B of one layer, and its settings."""

    path: str
    a: Tensor
    b: Tensor
    rank: int
    alpha: float
    scale: float
    kernel: int | None
    """Side of a convolution's kernel; None for any other layer."""

    @property
    def slices(self) -> int:
        """The number of a MergedLinear's slices, stacked in A and B; 1 for a whole layer."""
        return self.a.shape[0] // self.rank

    @property
    def shapes(self) -> str:
        """Both shapes in words."""
        return f"A {tuple(self.a.shape)}, B {tuple(self.b.shape)}"


def read_loralib(
    path: Path, config: LoRAConfig, kernel_sizes: Mapping[str, int] | None = None
) -> AdapterContent:
    """Read a file that loralib's lora_state_dict was saved to.

    Linear, Embedding, MergedLinear and Conv2d layers are read. A MergedLinear's A and B hold its
    enabled slices one below the other: those of q, k, v that `config.targets` names. Other tensors
    become biases and full copies under the base's own names.

    Args:
        path: the .pt or .bin file.
        config: the rank, alpha and targets that the layers were made with. A word of rank_pattern
            and alpha_pattern is here a layer's path, or the last whole components of it.
        kernel_sizes: the convolutions, in the same words, and the size of their (square) kernels.

    Raises:
        AdapterFileError: the file is damaged, or does not fit the settings.
    """
    try:
        tensors = read_pickle(path.read_bytes(), path.name)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    problems = value_problems(tensors)
    layers = _layers(tensors, config, kernel_sizes or {}, problems)
    sites, named = _sites(layers, config, problems)
    others = {
        _base_name(name, layers): tensor
        for name, tensor in tensors.items()
        if not name.endswith(_ENDS)
    }
    adapted = {layer.path for layer in layers}
    copied = _copied(others, adapted, problems)
    if problems:
        raise AdapterFileError.listing(f"{path} cannot be used", problems)
    return AdapterContent(
        configs=(_with_extras(config, others, adapted, copied),),
        sites=tuple(sites),
        tensors=named | others,
        copied_modules=copied,
        unverified=(
            *UNPROVEN,
            *([UNPROVEN_BIASES] if any(name.endswith(".bias") for name in others) else []),
            *([UNPROVEN_KERNELS] if kernel_sizes else []),
        ),
    )


def _layers(
    tensors: Mapping[str, Tensor],
    config: LoRAConfig,
    kernel_sizes: Mapping[str, int],
    problems: list[str],
) -> list[_Layer]:
    """The layers that have both A and B, in the file's order."""
    names = [name.rpartition(".")[0] for name in tensors if name.endswith(_ENDS)]
    paths = list(dict.fromkeys(names))
    if not paths:
        tool = tool_of(tensors)
        whose = f"; its names are those of {tool}, which lorakit does not read" if tool else ""
        problems.append(f"it holds no update: no tensor is called ….lora_A{whose}")
        return []
    ranks = _by_path(config.rank_pattern, paths, "rank_pattern", problems)
    alphas = _by_path(config.alpha_pattern, paths, "alpha_pattern", problems)
    kernels = _by_path(kernel_sizes, paths, "kernel_sizes", problems)
    layers = []
    for path in paths:
        a, b = tensors.get(f"{path}.lora_A"), tensors.get(f"{path}.lora_B")
        if a is None or b is None:
            problems.append(f"{path}.lora_{'A' if a is None else 'B'}  missing from the file")
            continue
        rank = ranks.get(path, config.rank)
        alpha = float(alphas.get(path, config.alpha) or rank)
        scale = scale_of(rank, alpha, use_rslora=config.use_rslora)
        kernel = kernels.get(path)
        layers.append(
            _Layer(path=path, a=a, b=b, rank=rank, alpha=alpha, scale=scale, kernel=kernel)
        )
    return layers


def _by_path(
    values: Mapping[str, V], paths: list[str], setting: str, problems: list[str]
) -> dict[str, V]:
    """The value of each layer that a word names; the last word that names it counts."""
    found: dict[str, V] = {}
    unknown = []
    for word, value in values.items():
        named = [path for path in paths if f".{path}".endswith(f".{word}")]
        found |= dict.fromkeys(named, value)
        if not named:
            unknown.append(repr(word))
    if unknown:
        more = ", …" if len(paths) > _LISTED_LAYERS else ""
        problems.append(
            f"{setting}: {', '.join(unknown)} is neither the path of a layer nor the end of one; "
            f"the file's layers are {', '.join(paths[:_LISTED_LAYERS])}{more}"
        )
    return found


def _sites(
    layers: Iterable[_Layer], config: LoRAConfig, problems: list[str]
) -> tuple[list[Site], dict[str, Tensor]]:
    """The sites in the file's order, and their tensors under lorakit's names."""
    sites: list[Site] = []
    named: dict[str, Tensor] = {}
    for layer in layers:
        wrong = _misfit(layer, config)
        if wrong:
            problems.append(f"{layer.path}  {wrong}")
            continue
        for site, a, b in _updates(layer, config):
            sites.append(site)
            named[f"{site.name}.lora_a"], named[f"{site.name}.lora_b"] = a, b
    return sites, named


def _misfit(layer: _Layer, config: LoRAConfig) -> str | None:
    """The reason why A and B cannot be those of such a layer with these settings, or None."""
    a, b, rank = layer.a, layer.b, layer.rank
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        return f"{layer.shapes} don't pair"
    if layer.kernel is not None:
        return _conv_misfit(layer, layer.kernel)
    if b.shape[1] != rank:
        return (
            f"has {layer.shapes}, but the config says rank {rank}: was it trained with rank "
            f"{b.shape[1]}? (A convolution has the kernel's size times the rank there: name it in "
            "kernel_sizes)"
        )
    slices = _enabled(config)
    count = layer.slices
    if a.shape[0] % rank or (count > 1 and (count != len(slices) or b.shape[0] % count)):
        named = ", ".join(slices) or "none"
        return (
            f"has {layer.shapes}: {a.shape[0] / rank:g} slices of rank {rank}, but the "
            f"targets name {named} of {', '.join(SLICES)}"
        )
    return None


def _conv_misfit(layer: _Layer, kernel: int) -> str | None:
    if kernel < 1:
        return f"has no kernel of size {kernel}: kernel_sizes are 1 or more"
    inner = layer.rank * kernel
    rows_a, columns_a, rows_b, columns_b = *layer.a.shape, *layer.b.shape
    if rows_a == columns_b == inner and columns_a % kernel == rows_b % kernel == 0:
        return None
    return (
        f"has {layer.shapes}, but a convolution of rank {layer.rank} with a {kernel}x{kernel} "
        f"kernel has A ({inner}, {kernel}·c_in), B ({kernel}·c_out, {inner})"
    )


def _enabled(config: LoRAConfig) -> tuple[str, ...]:
    """The slices that the targets name, in their order in the layer."""
    named = {"q", "k", "v"} if "attention" in config.targets else set(config.targets)
    return tuple(part for part in SLICES if part in named)


def _updates(layer: _Layer, config: LoRAConfig) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Site, A and B: of a whole layer once, of a MergedLinear once for each slice."""
    if layer.kernel is not None:
        yield _convolution(layer, layer.kernel, use_rslora=config.use_rslora)
        return
    parts = zip(layer.a.chunk(layer.slices), layer.b.chunk(layer.slices), strict=True)
    for site, (a, b) in zip(_matrix_sites(layer, _enabled(config)), parts, strict=True):
        yield site, a.clone(), b.clone()


def _convolution(layer: _Layer, kernel: int, *, use_rslora: bool) -> tuple[Site, Tensor, Tensor]:
    """The convolution of rank r·k·k that has the same ΔW; the module's docstring says why."""
    rank = layer.rank * kernel**2
    # The alpha of rank r·k·k that gives the same scale.
    alpha = layer.alpha * (kernel if use_rslora else kernel**2)
    site = Site(path=layer.path, rank=rank, alpha=alpha, scale=layer.scale, kind="conv")
    a = torch.block_diag(*[layer.a] * kernel).reshape(rank, -1, kernel, kernel)
    return site, a, layer.b.reshape(-1, rank, 1, 1).clone()


def _matrix_sites(layer: _Layer, slices: tuple[str, ...]) -> list[Site]:
    """One site for a whole layer, or one for each slice of a MergedLinear."""
    leaf = layer.path.rpartition(".")[2]
    if layer.slices == 1 and not (len(slices) == 1 and leaf in FUSED):
        kind: Literal["embedding", "linear"] = "embedding" if leaf in EMBEDDINGS else "linear"
        return [
            Site(path=layer.path, rank=layer.rank, alpha=layer.alpha, scale=layer.scale, kind=kind)
        ]
    height = layer.b.shape[0] // layer.slices
    return [
        Site(
            path=layer.path,
            role=role,
            rows=((SLICES.index(role) * height, (SLICES.index(role) + 1) * height),),
            layer_rows=len(SLICES) * height,
            rank=layer.rank,
            alpha=layer.alpha,
            scale=layer.scale,
        )
        for role in slices
    ]


def _base_name(name: str, layers: Iterable[_Layer]) -> str:
    """The base's own name of a tensor: loralib keeps a convolution in a child, `conv`."""
    owner, _, leaf = name.rpartition(".")
    inner = {f"{layer.path}.conv": layer.path for layer in layers if layer.kernel is not None}
    return f"{inner[owner]}.{leaf}" if owner in inner else name


def _copied(
    others: Mapping[str, Tensor], adapted: set[str], problems: list[str]
) -> tuple[str, ...]:
    """The modules that the file holds in full: those with a parameter that is no bias."""
    owners = [name.rpartition(".")[0] for name in others if not name.endswith(".bias")]
    problems += [
        f"{path}.weight  is the base's own: save lora_state_dict(model), not model.state_dict()"
        for path in owners
        if path in adapted
    ]
    return tuple(dict.fromkeys(owners))


def _with_extras(
    config: LoRAConfig, others: Mapping[str, Tensor], adapted: set[str], copied: tuple[str, ...]
) -> LoRAConfig:
    """The config, with `bias` and `modules_to_save` as the file's tensors imply."""
    owners = {name.rpartition(".")[0] for name in others}.difference(copied)
    bias = "none" if not owners else "lora" if owners <= adapted else "all"
    return config.model_copy(update={"bias": bias, "modules_to_save": copied})
