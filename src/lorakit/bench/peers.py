"""Random adapters for lorakit and for PEFT, saved as folders that both read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.attach import attach, detach, extract
from lorakit.config.methods import LoRAConfig
from lorakit.errors import MissingExtraError

SPREAD_OF_B = 0.02
"""Standard deviation of B: the update is a few hundredths of a layer's output."""


def save_random_adapters(
    model: PreTrainedModel, folder: Path, *, count: int, rank: int, dtype: str
) -> list[Path]:
    """Save adapters on all linear layers of a model, and return their folders.

    A and B are random, and different in each. The model stays as it was.
    """
    config = LoRAConfig(rank=rank, targets=("all-linear",), dtype=dtype)
    attach(model, config)
    fresh = extract(model)
    detach(model)
    return [_random(fresh, seed).save(folder / f"adapter-{seed}") for seed in range(count)]


def _random(fresh: Adapter, seed: int) -> Adapter:
    """An adapter of the same shapes, with random A and B."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, like: Tensor) -> Tensor:
        spread = SPREAD_OF_B if name.endswith(".lora_b") else (3 * like.shape[1]) ** -0.5
        return (torch.randn(like.shape, generator=generator) * spread).to(like.dtype)

    return replace(fresh, tensors={name: drawn(name, t) for name, t in fresh.tensors.items()})


def require_peft() -> Any:
    """PEFT's module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("measuring PEFT (--no-peer leaves it out)", "bench") from None
    return peft


def peft_model(model: PreTrainedModel, folders: Sequence[Path], *, adapter_dtype: str) -> Any:
    """PEFT's model with the adapters of some folders, which have the folders' names.

    It is set for the least work: eval mode, nothing trainable, A and B in the same precision as
    lorakit's, no random start for weights that the file fills.
    """
    how = peft_loading(adapter_dtype)
    first, *others = folders
    made = require_peft().PeftModel.from_pretrained(model, first, adapter_name=first.name, **how)
    for folder in others:
        made.load_adapter(folder, adapter_name=folder.name, **how)
    return made.eval()


def peft_loading(adapter_dtype: str) -> dict[str, Any]:
    """The keywords with which PEFT loads fastest, with A and B in the given precision."""
    # Without the cast to float32, PEFT gives A and B the precision of the base.
    return {"autocast_adapter_dtype": adapter_dtype == "float32", "low_cpu_mem_usage": True}
