"""Reading what loralib.lora_state_dict gave: A and B by raw module path, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from lorakit.adapter import Adapter, Site, scale_of
from lorakit.config import LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.formats.peft_read import EMBEDDINGS
from lorakit.formats.weights import read_pickle, value_problems

PARTS = ("q", "k", "v")
"""Slices of a MergedLinear, which divide its rows equally."""
FUSED = ("c_attn", "in_proj", "qkv", "qkv_proj", "query_key_value")
"""What a layer is called that can be a MergedLinear with one slice enabled."""
UNPROVEN = (
    "the base: loralib does not name it",
    "the weights: there is no hash, so that a change of them would not be noticed",
    "rank, alpha and targets: they are those of the given config; the file holds none",
    "which rows the slices are: q, k, v are taken as equal thirds, enabled as the targets say",
    "which layers are embeddings: it is told by their names, and matters for PEFT's files alone",
)


def read_loralib(path: Path, config: LoRAConfig) -> Adapter:
    """Read a file that loralib's lora_state_dict was saved to.

    Linear, Embedding and MergedLinear layers are read. Of a MergedLinear, whose A and B hold its
    enabled slices one below the other, the slices are those of q, k, v that `config.targets` names.
    Other tensors become biases and full copies under the base's own names.

    Args:
        path: the .pt or .bin file.
        config: rank, alpha and targets, as the layers were made with.

    Raises:
        AdapterFileError: the file is damaged, does not fit the config, or holds convolutions.
    """
    try:
        tensors = read_pickle(path.read_bytes(), path.name)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    problems = value_problems(tensors)
    if config.rank_pattern or config.alpha_pattern:
        problems.append("rank_pattern and alpha_pattern: loralib's files are read without")
    sites, named = _sites(tensors, config, problems)
    others = {name: t for name, t in tensors.items() if not name.endswith((".lora_A", ".lora_B"))}
    adapted = {site.path for site in sites}
    copied = _copied(others, adapted, problems)
    if problems:
        raise AdapterFileError.listing(f"{path} cannot be used", problems)
    return Adapter(
        config=_with_extras(config, others, adapted, copied),
        sites=tuple(sites),
        tensors=named | others,
        copied_modules=copied,
        unverified=UNPROVEN,
    )


def _sites(
    tensors: Mapping[str, Tensor], config: LoRAConfig, problems: list[str]
) -> tuple[list[Site], dict[str, Tensor]]:
    """Return the sites in the file's order, and their tensors under lorakit's names."""
    sites: list[Site] = []
    named: dict[str, Tensor] = {}
    paths = [name.rpartition(".")[0] for name in tensors if name.endswith((".lora_A", ".lora_B"))]
    for path in dict.fromkeys(paths):
        a, b = tensors.get(f"{path}.lora_A"), tensors.get(f"{path}.lora_B")
        if a is None or b is None:
            problems.append(f"{path}.lora_{'A' if a is None else 'B'}  missing from the file")
            continue
        wrong = _misfit(path, a, b, config)
        if wrong:
            problems.append(f"{path}  {wrong}")
            continue
        for site, part in zip(_layer_sites(path, a, b, config), _parts(a, b, config), strict=True):
            sites.append(site)
            named[f"{site.name}.lora_a"], named[f"{site.name}.lora_b"] = part
    if not paths:
        problems.append("it holds no update: no tensor is called ….lora_A")
    return sites, named


def _misfit(path: str, a: Tensor, b: Tensor, config: LoRAConfig) -> str | None:
    """Return why A and B cannot be those of a Linear, an Embedding or a MergedLinear."""
    shapes = f"A {tuple(a.shape)}, B {tuple(b.shape)}"
    if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        return f"{shapes} don't pair"
    if b.shape[1] != config.rank:
        return (
            f"has {shapes}, but the config says rank {config.rank}: was it trained with rank "
            f"{b.shape[1]}? (A ConvLoRA has the kernel's size times the rank there. It can't be "
            "read: folded into the kernel's shape, its B·A is of a higher rank)"
        )
    count = a.shape[0] // config.rank
    slices = _enabled(config)
    if a.shape[0] % config.rank or (count > 1 and (count != len(slices) or b.shape[0] % count)):
        named = ", ".join(slices) or "none"
        return (
            f"has {shapes}: {a.shape[0] / config.rank:g} slices of rank {config.rank}, but the "
            f"targets name {named} of {', '.join(PARTS)}"
        )
    return None


def _enabled(config: LoRAConfig) -> tuple[str, ...]:
    """Return the slices that the targets name, in the order in which they lie in the layer."""
    named = {"q", "k", "v"} if "attention" in config.targets else set(config.targets)
    return tuple(part for part in PARTS if part in named)


def _parts(a: Tensor, b: Tensor, config: LoRAConfig) -> list[tuple[Tensor, Tensor]]:
    count = a.shape[0] // config.rank
    return [
        (part_a.clone(), part_b.clone())
        for part_a, part_b in zip(a.chunk(count), b.chunk(count), strict=True)
    ]


def _layer_sites(path: str, a: Tensor, b: Tensor, config: LoRAConfig) -> list[Site]:
    """Return one site for a whole layer, or one for each slice of a MergedLinear."""
    count, slices = a.shape[0] // config.rank, _enabled(config)
    leaf = path.rpartition(".")[2]
    alpha = float(config.alpha or config.rank)
    scale = scale_of(config.rank, alpha, use_rslora=config.use_rslora)
    if count == 1 and not (len(slices) == 1 and leaf in FUSED):
        kind: Literal["embedding", "linear"] = "embedding" if leaf in EMBEDDINGS else "linear"
        return [Site(path=path, rank=config.rank, alpha=alpha, scale=scale, kind=kind)]
    height = b.shape[0] // count
    return [
        Site(
            path=path,
            role=role,
            rows=((PARTS.index(role) * height, (PARTS.index(role) + 1) * height),),
            layer_rows=len(PARTS) * height,
            rank=config.rank,
            alpha=alpha,
            scale=scale,
        )
        for role in slices
    ]


def _copied(
    others: Mapping[str, Tensor], adapted: set[str], problems: list[str]
) -> tuple[str, ...]:
    """Return the modules that the file holds in full: those with a parameter that is no bias."""
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
    """Return the config with the biases and copies that the file turned out to hold."""
    owners = {name.rpartition(".")[0] for name in others}.difference(copied)
    bias = "none" if not owners else "lora" if owners <= adapted else "all"
    return config.model_copy(update={"bias": bias, "modules_to_save": copied})
