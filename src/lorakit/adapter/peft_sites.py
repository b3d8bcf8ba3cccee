"""One site of a folder of PEFT's, from its tensors and the settings for its layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lorakit.adapter.expert_layers import parted
from lorakit.adapter.fused_layers import WholeLayer, unstack
from lorakit.adapter.peft import NORMS_OF_GROUPS, PREFIX
from lorakit.adapter.peft_config import CONFIG_FILE, PeftConfig
from lorakit.adapter.site import LayerKind, Site, named_by


def site_of(
    config: PeftConfig, path: str, kind: LayerKind, update: Mapping[str, Tensor]
) -> tuple[Site | None, dict[str, Tensor], list[str]]:
    """A layer's site and its tensors, or None and the problems."""
    missing = [end for end in "ab" if end not in update]
    if missing:
        return None, {}, [f"{PREFIX}{path}  has no lora_{missing[0].upper()} in the file"]
    if config.use_dora and (problem := _magnitude_problem(update)):
        return None, {}, [f"{PREFIX}{path}  {problem}"]
    if config.lora_bias and (problem := _bias_problem(update)):
        return None, {}, [f"{PREFIX}{path}  {problem}"]
    a, b = update["a"], update["b"]
    settings_path = named_by(path, kind)
    rank = config.rank_of(settings_path)
    if a.dim() < 2 or a.dim() != b.dim() or 0 in (*a.shape, *b.shape):
        return None, {}, [f"{PREFIX}{path}  A {tuple(a.shape)} and B {tuple(b.shape)} don't pair"]
    if a.shape[0] != rank:
        text = f"A has rank {a.shape[0]}, but {CONFIG_FILE} says {rank}"
        return None, {}, [f"{PREFIX}{path}  {text}: was it trained with rank {a.shape[0]}?"]
    is_conv = a.dim() > 2
    is_transposed = config.fan_in_fan_out and kind == "linear"
    groups = rank // b.shape[1] if is_conv else 1
    if b.shape[1] * groups != rank or a.shape[1] % groups or b.shape[2:].numel() != 1:
        text = f"B {tuple(b.shape)} does not go with rank {rank}"
        return None, {}, [f"{PREFIX}{path}  {text}"]
    share = groups**0.5 if config.use_rslora else groups
    site = Site(
        path=path,
        rank=rank // groups,
        alpha=config.alpha_of(settings_path) / share,
        scale=config.scale_of(settings_path),
        groups=groups,
        kind="conv" if is_conv else "transposed" if is_transposed else kind,
    )
    whole = WholeLayer(sites=(site,), width=site.rank, alpha=site.alpha, scale=site.scale)
    parts = unstack(whole, a, b / 2 if kind == "out_proj" and not config.adds_twice else b)
    if parts is None:
        text = (
            f"A mixes the convolution's {groups} groups, which no change of its weight can do: "
            "train without it (PEFT's exclude_modules)"
        )
        return None, {}, [f"{PREFIX}{path}  {text}"]
    for end in ("bias", "magnitude"):
        if end in update:
            parts[f"{site.name}.lora_{end}"] = update[end].flatten()
    return site, parts, []


def site_of_experts(
    config: PeftConfig, path: str, kind: LayerKind, update: Mapping[str, Tensor]
) -> tuple[Site | None, dict[str, Tensor], list[str]]:
    """The site and the tensors of a parameter of experts, or None and the problems."""
    a, b = update.get("a"), update.get("b")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape):
        shapes = ", ".join(f"{e.upper()} {tuple(t.shape)}" for e, t in sorted(update.items()))
        return None, {}, [f"{PREFIX}{path}  A and B do not pair: {shapes}"]
    rank = config.rank_of(path)
    if a.shape[0] != b.shape[1] or a.shape[0] % rank:
        text = f"A {tuple(a.shape)} and B {tuple(b.shape)} do not go with rank {rank}"
        return None, {}, [f"{PREFIX}{path}  {text} of each expert"]
    alpha, scale = config.alpha_of(path), config.scale_of(path)
    site = Site(path=path, rank=rank, alpha=alpha, scale=scale, kind="experts")
    parts = dict(zip("ab", parted(a, b, a.shape[0] // rank), strict=True))
    return site, {f"{site.name}.lora_{end}": tensor for end, tensor in parts.items()}, []


def _bias_problem(update: Mapping[str, Tensor]) -> str | None:
    """The problem of a layer's update under lora_bias, or None."""
    if "bias" not in update:
        return "has no lora_B.bias in the file, and lora_bias is true"
    if update["bias"].shape != update["b"].shape[:1]:
        shape, rows = tuple(update["bias"].shape), update["b"].shape[0]
        return f"has a lora_B.bias {shape} for {rows} rows"
    return None


def _magnitude_problem(update: Mapping[str, Tensor]) -> str | None:
    """The problem of a layer's update under use_dora, or None."""
    a, b = update["a"], update["b"]
    if a.dim() == b.dim() > 2 and a.shape[0] != b.shape[1]:
        return f"is a grouped convolution: {NORMS_OF_GROUPS}"
    if "magnitude" not in update:
        return "has no lora_magnitude_vector in the file, and use_dora is true"
    rows = b.shape[0]
    if update["magnitude"].shape != ((rows,) if a.dim() == 2 else (1, rows, *b.shape[2:])):
        shape = tuple(update["magnitude"].shape)
        return f"has a lora_magnitude_vector {shape} for {rows} rows"
    return None
