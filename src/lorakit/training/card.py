"""The training card of an adapter: how it was trained, and what it scored."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.config.marks import settings_where
from lorakit.config.train import TrainConfig
from lorakit.data.objectives import OBJECTIVES, task_of_base
from lorakit.models.quantized import card_of_base
from lorakit.models.tasks import model_task
from lorakit.training.prepare import Prepared
from lorakit.training.resume import ChangedSetting
from lorakit.upstream.versions import installed_version


def training_card(
    config: TrainConfig,
    prepared: Prepared,
    changes: Sequence[ChangedSetting],
    *,
    step: int,
    history: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The training card of an adapter after a step; identical runs have identical ones.

    It has no dates and no times.
    """
    on_card = set(settings_where(TrainConfig, lambda mark: mark.on_card))
    scores = [e for e in history if any(key.startswith("eval_") for key in e)]
    quantized = card_of_base(prepared.model)
    compares, task = prepared.task == "preference", task_of_base(prepared.task)
    libraries = ("lorakit", "torch", "transformers", *(["bitsandbytes"] if quantized else []))
    return {
        "task": task,
        "task_type": model_task(task, prepared.model.config).peft_type or None,
        "rows_kind": prepared.kind,
        "labels": None if prepared.labels is None else list(prepared.labels),
        "end_tokens": list(prepared.training.ends),
        **_may_answer_nothing(prepared),
        "data": config.data.model_dump(mode="json"),
        "rows": {
            "training": len(prepared.training.examples),
            "validation": len(prepared.validation.examples) if prepared.validation else 0,
        },
        "settings": config.model_dump(mode="json", include=on_card),
        **({"preference": config.preference.model_dump(mode="json")} if compares else {}),
        **quantized,
        **_rates_of_rule(config, prepared),
        **({"changes": [dict(change) for change in changes]} if changes else {}),
        "step": step,
        "scores": {
            name.removeprefix("eval_"): value
            for name, value in (scores[-1] if scores else {}).items()
            if name.startswith("eval_") and math.isfinite(value)
        },
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) or "unknown" for name in libraries},
        },
    }


def _may_answer_nothing(prepared: Prepared) -> dict[str, bool]:
    """The card's entry of questions without an answer, where some were trained on."""
    objective = OBJECTIVES.get(prepared.task)
    if objective is None or not objective.may_answer_nothing(prepared.training.examples):
        return {}
    return {"may_answer_nothing": True}


def _rates_of_rule(config: TrainConfig, prepared: Prepared) -> dict[str, Any]:
    """The card's entry of the peak learning rates, where the settings have none."""
    if config.learning_rate is not None:
        return {}
    rates = {method: rate.value for method, rate in prepared.rates.items()}
    return {"learning_rates": rates}
