"""Reading the LoRA files of kohya's sd-scripts and of diffusers, for one model of a pipeline.

Such a file may be for several models, each with a prefix, and kohya writes paths with "_" in the
place of ".". So the layers are found by the names and shapes of a given model's own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.file_sizes import header_of, size_problems
from lorakit.adapter.peft_config import PeftConfig, read_config
from lorakit.adapter.site import LayerKind, Site
from lorakit.adapter.tensor_files import read_safetensors, value_problems
from lorakit.adapter.unet_names import stability_names
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.models.base import base_modules
from lorakit.upstream.private_names import own_parameters

PREFIXES = (
    *("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_transformer_"),
    *("unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", "transformer."),
)
"""What the names of a model's layers begin with: kohya's, then diffusers'."""
ENDS = {
    "a": (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight"),
    "b": (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", "_lora.up.weight"),
    "alpha": (".alpha",),
}
METADATA = "lora_adapter_metadata"
"""Where diffusers keeps PEFT's settings of each model, in the header."""
UNPROVEN = (
    "the base: the file does not name it, and layers were found by their names and shapes",
    "the weights: there is no hash, so that a change of them would not be noticed",
)


@dataclass
class _Found:
    """The layers that a file has for one model."""

    prefix: str
    layers: dict[str, dict[str, Tensor]]
    """The tensors "a", "b" and "alpha" of each, by the path in the model."""
    unknown: list[str] = field(default_factory=list)
    """The names of layers that the model has not."""


def read_for(path: Path, base: nn.Module) -> AdapterContent:
    """The adapter that a file of kohya's or diffusers' has for a model.

    Args:
        path: the safetensors file.
        base: the model of the pipeline: its U-Net, transformer, or text encoder.

    Raises:
        AdapterFileError: every problem of the file in one message.
    """
    tensors, metadata, problems = _read(path)
    by_name, others = _by_name(tensors)
    problems += [f"{name}  is no A, B or alpha of a plain LoRA" for name in others]
    groups = [_matched(prefix, by_name, base) for prefix in _prefixes(by_name)]
    fitting = [group for group in groups if group.layers]
    if not problems and len(fitting) != 1:
        which = ", ".join(group.prefix or "(none)" for group in fitting or groups)
        problems.append(
            f"the layers of {'several' if fitting else 'no'} prefix have the names and shapes of "
            f"this {type(base).__name__}'s: {which}"
        )
    if problems:
        raise AdapterFileError.listing(f"{path} cannot be used", problems)
    found = fitting[0]
    config = _settings(found.prefix, metadata, problems)
    sites, named = _sites(found, config, problems)
    problems += [f"{found.prefix}{name}  is no layer of this model" for name in found.unknown]
    if problems:
        raise AdapterFileError.listing(f"{path} cannot be used", problems)
    left = [
        f"the layers of {group.prefix}: they are of another model, and left out"
        for group in groups
        if group is not found
    ]
    return AdapterContent(
        configs=(_lora_config(sites, named),),
        sites=tuple(sites),
        tensors=named,
        unverified=(*UNPROVEN, *left),
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """A file's tensors, the metadata of its header, and the problems of both."""
    problems = size_problems(path.parent, (path.name,))
    if problems:
        return {}, {}, problems
    try:
        tensors = read_safetensors(path.read_bytes(), path.name)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    except AdapterFileError as error:
        return {}, {}, [str(error)]
    header = header_of(path) or {}
    return tensors, header.get("__metadata__") or {}, value_problems(tensors)


def _by_name(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each layer, by the layer's name in the file, and the names of all others."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in sorted(tensors.items()):
        fits = [(kind, end) for kind, ends in ENDS.items() for end in ends if key.endswith(end)]
        if not fits:
            others.append(key)
            continue
        kind, end = fits[0]
        name = key.removesuffix(end)
        # Early versions of diffusers kept A and B in the attention's processor.
        name = name.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
        layers.setdefault(name, {})[kind] = tensor
    return layers, others


def _prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of some names; "" for those that have none of the known ones."""
    found = (next((p for p in PREFIXES if name.startswith(p)), "") for name in names)
    return list(dict.fromkeys(found))


def _matched(prefix: str, by_name: Mapping[str, dict[str, Tensor]], base: nn.Module) -> _Found:
    """The layers with a prefix that a model has by name and shape."""
    modules = dict(_names_of(base, flat=prefix.endswith("_")))
    found = _Found(prefix, {})
    for name, own in by_name.items():
        if _prefixes([name]) != [prefix]:
            continue
        rest = name.removeprefix(prefix)
        path, module = modules.get(rest, (None, None))
        if path is None or module is None or not _fits(module, own):
            found.unknown.append(rest)
        else:
            found.layers[path] = own
    return found


def _names_of(base: nn.Module, *, flat: bool) -> Iterator[tuple[str, tuple[str, nn.Module]]]:
    """The names that a file may have for each layer of a model, with its path and itself."""
    layers = {
        path: module
        for path, module in base_modules(base)
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    # A text encoder may be held with or without the module around it.
    names = [pair for path in layers for pair in ((path, path), (path, f"text_model.{path}"))]
    for path, name in (*names, *stability_names(layers)):
        yield (name.replace(".", "_") if flat else name), (path, layers[path])


def _fits(module: nn.Module, own: Mapping[str, Tensor]) -> bool:
    """Whether A and B have the sizes of a layer's input and output."""
    weight, a, b = own_parameters(module).get("weight"), own.get("a"), own.get("b")
    if weight is None or a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return weight is not None and (a is None or b is None)
    return a[0].numel() == weight[0].numel() and len(b) == len(weight)


def _settings(prefix: str, metadata: Mapping[str, Any], problems: list[str]) -> PeftConfig | None:
    """PEFT's settings of a model in diffusers' metadata; None: there are none."""
    try:
        held = json.loads(metadata.get(METADATA, "null"))
    except (TypeError, ValueError):
        problems.append(f"{METADATA}  is no JSON")
        return None
    own = {
        key.removeprefix(prefix): value
        for key, value in (held if isinstance(held, dict) else {}).items()
        if key.startswith(prefix)
    }
    config = read_config({"peft_type": "LORA", **own}, problems) if own else None
    if config is not None and config.init_lora_weights == "loftq":
        problems.append(f"{METADATA}  init_lora_weights: 'loftq' is read from PEFT's folders alone")
    return config


def _sites(
    found: _Found, config: PeftConfig | None, problems: list[str]
) -> tuple[list[Site], dict[str, Tensor]]:
    """The sites of a model's layers, and their tensors."""
    sites: list[Site] = []
    named: dict[str, Tensor] = {}
    for path, own in sorted(found.layers.items(), key=lambda item: _natural(item[0])):
        a, b = own.get("a"), own.get("b")
        if a is None or b is None or a.shape[0] != b.shape[1] or b[0, 0].numel() != 1:
            problems.append(f"{path}  A and B don't pair")
            continue
        rank = a.shape[0]
        if "alpha" in own or config is None:
            alpha = float(own["alpha"]) if "alpha" in own else float(rank)
        else:
            alpha = config.scale_of(path) * rank
        if alpha <= 0:
            problems.append(f"{path}  has alpha {alpha:g}")
            continue
        kind: LayerKind = "conv" if a.dim() > 2 else "linear"
        sites.append(Site(path=path, rank=rank, alpha=alpha, scale=alpha / rank, kind=kind))
        named |= {f"{path}.lora_a": a.contiguous(), f"{path}.lora_b": b.contiguous()}
    return sites, named


def _natural(path: str) -> list[tuple[int, str]]:
    """The sort key that puts block 10 behind block 9."""
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"[._]", path)]


def _lora_config(sites: list[Site], tensors: Mapping[str, Tensor]) -> LoRAConfig:
    (rank, _), *_ = Counter(site.rank for site in sites).most_common(1)
    (alpha, _), *_ = Counter(site.alpha for site in sites).most_common(1)
    dtype = str(tensors[f"{sites[0].name}.lora_a"].dtype).removeprefix("torch.")
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(site.path for site in sites),
        rank_pattern={site.path: site.rank for site in sites if site.rank != rank},
        alpha_pattern={site.path: site.alpha for site in sites if site.alpha != alpha},
        dtype="float32" if dtype == "float64" else dtype,
    )
