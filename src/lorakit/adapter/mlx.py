"""Reading mlx-lm's adapter folders: `adapters.safetensors` beside its own adapter_config.json.

mlx-lm computes y + scale·((x·a)·b), with a (d_in, rank) and b (rank, d_out), so that A and B are
their transposes; its scale is the whole factor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.json_files import file_problems
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.site import Site
from lorakit.config.methods import LoRAConfig

MLX_FILE = "adapters.safetensors"
KEY = re.compile(r"(?P<path>.+)\.(?P<end>lora_a|lora_b|m)")
LOOKED_UP = ("embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte")
"""What embeddings are called; in mlx-lm a tied head has their update too."""
UNPROVEN = (
    "the base: mlx-lm names it at most, and names of layers that are other ones in transformers "
    "are noticed by attach alone",
    "the weights: there is no hash, so that a change of them would not be noticed",
)
WITH_ALPHA = "the scale: lora_parameters has an alpha, as in early versions, so it is scale·alpha/r"


class MlxParameters(BaseModel):
    """The settings of mlx-lm's updates."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    rank: Annotated[int, Field(ge=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Early versions multiplied the scale by alpha/rank."""


class MlxConfig(BaseModel):
    """What counts of mlx-lm's adapter_config.json, which also has the settings of the run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    fine_tune_type: Literal["lora", "dora"] = "lora"
    lora_parameters: MlxParameters
    model: str | None = None


def read_mlx(
    raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[AdapterContent | None, list[str]]:
    """The adapter in mlx-lm's two files, or None and the problems.

    Args:
        raw: the object in adapter_config.json.
        tensors: those of adapters.safetensors.
    """
    try:
        config = MlxConfig.model_validate(raw)
    except ValidationError as error:
        return None, file_problems(CONFIG_FILE, error)
    settings, uses_dora = config.lora_parameters, config.fine_tune_type == "dora"
    layers, problems = _by_layer(tensors)
    sites, named = [], {}
    scale = settings.scale * (settings.alpha or settings.rank) / settings.rank
    for path, own in layers.items():
        wrong = _problem(path, own, settings.rank, uses_dora=uses_dora)
        if wrong is not None:
            problems.append(f"{path}  {wrong}")
            continue
        sites.append(Site(path=path, rank=settings.rank, alpha=scale * settings.rank, scale=scale))
        named[f"{path}.lora_a"] = own["lora_a"].T.contiguous()
        named[f"{path}.lora_b"] = own["lora_b"].T.contiguous()
        if uses_dora:
            named[f"{path}.lora_magnitude"] = own["m"]
    if not layers:
        problems.append("it holds no update: no tensor is called ….lora_a")
    if problems:
        return None, problems
    dtype = str(named[f"{sites[0].name}.lora_a"].dtype).removeprefix("torch.")
    made = LoRAConfig(
        rank=settings.rank,
        alpha=scale * settings.rank,
        targets=tuple(site.path for site in sites),
        dropout=settings.dropout,
        use_dora=uses_dora,
        dtype="float32" if dtype == "float64" else dtype,
    )
    adapter = AdapterContent(
        configs=(made,),
        sites=tuple(sites),
        tensors=named,
        card={"base_model": config.model} if config.model else {},
        unverified=(*UNPROVEN, *([WITH_ALPHA] if settings.alpha else [])),
    )
    return adapter, []


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors of each layer by their last names, and a line for each other tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    problems = []
    for name in sorted(tensors, key=_natural):
        match = KEY.fullmatch(name)
        if match is None:
            problems.append(f"{name}  unexpected: it is no layer's lora_a, lora_b or m")
        else:
            layers.setdefault(match["path"], {})[match["end"]] = tensors[name]
    return layers, problems


def _natural(name: str) -> list[tuple[int, str]]:
    """The sort key that puts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _problem(path: str, own: Mapping[str, Tensor], rank: int, *, uses_dora: bool) -> str | None:
    """Why the tensors of a layer are no update that can be read; None: they are."""
    expected = {"lora_a", "lora_b"} | ({"m"} if uses_dora else set())
    if set(own) != expected:
        return f"has {', '.join(sorted(own))}; {', '.join(sorted(expected))} expected"
    a, b = own["lora_a"], own["lora_b"]
    if a.dim() == 3:
        return "is of experts, which have other names in mlx-lm than in transformers"
    if path.rpartition(".")[2] in LOOKED_UP:
        return "is an embedding, whose update acts in a tied head too, which the file doesn't show"
    if a.dim() != 2 or b.dim() != 2 or (a.shape[1], b.shape[0]) != (rank, rank) or 0 in a.shape:
        return f"lora_a {tuple(a.shape)} and lora_b {tuple(b.shape)} don't go with rank {rank}"
    if uses_dora and own["m"].shape != b.shape[1:]:
        return f"m {tuple(own['m'].shape)} does not go with {b.shape[1]} outputs"
    return None
