"""Settings that were given and have no effect in a run, each with the reason."""

from __future__ import annotations

from pydantic import BaseModel

from lorakit.config.train import TrainConfig

SECTIONS = {
    "lora": ("lora",),
    "full": ("full", "top-k"),
    "bitfit": ("bitfit",),
    "prefix": ("prefix-embedding", "prefix-layer"),
    "bottleneck": ("adapter-h", "adapter-l", "adapter-p", "adapter-d"),
}
"""The methods that a section of settings is of."""


def idle_settings(config: TrainConfig) -> tuple[str, ...]:
    """A line for each setting that differs from its default and has no effect in this run."""
    lora = config.lora
    is_lora = "lora" in config.method
    starts_by_eva = is_lora and lora.init == "eva" and config.init_from is None
    of_others = [
        f"{section}.{name} (method is {', '.join(config.method)})"
        for section, methods in SECTIONS.items()
        if not set(methods) & set(config.method)
        for name in changed(getattr(config, section))
    ]
    reasons = {
        "epochs": config.steps is not None and "steps are given",
        "eva_batches": not starts_by_eva and "nothing starts by init eva",
        "lora.svd_iterations": is_lora and lora.init != "pissa" and f"init is {lora.init}",
        "double_quantization": config.quantize != "4bit" and f"quantize is {config.quantize}",
        "preference.nll": config.preference.form not in ("cpo", "orpo")
        and f"form is {config.preference.form}",
        "preference.margin": config.preference.form != "simpo"
        and f"form is {config.preference.form}",
        "preference.trl": config.preference.through != "trl"
        and f"through is {config.preference.through}",
        "allow_other_base": config.init_from is None and "there is no init_from",
    }
    given = {*changed(config), *(f"lora.{name}" for name in changed(lora))}
    given |= {f"preference.{name}" for name in changed(config.preference)}
    told = [f"{name} ({why})" for name, why in reasons.items() if name in given and why]
    return tuple(dict.fromkeys([*of_others, *told]))


def changed(settings: BaseModel) -> list[str]:
    """The names of the settings that differ from their defaults."""
    defaults = {name: field.get_default() for name, field in type(settings).model_fields.items()}
    return [name for name, default in defaults.items() if getattr(settings, name) != default]
