"""The runs whose memory is measured beside its estimate, and bases of random weights for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.models.load import load_model
from lorakit.models.without_weights import load_tokenizer

TOKENIZER = "smollm2"
"""Whose tokenizer bases of random weights have."""
VOCABULARY = 49_152


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run: what is trained, and the size of its batches."""

    base: str
    """A packaged model, or one of `RANDOM`."""
    rows: int
    tokens: int
    """Of each row."""
    dtype: str = "float32"
    task: str = "generation"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of `lorakit train`."""

    @property
    def name(self) -> str:
        """The run in words."""
        told = [f"{key} {_word(value)}" for key, value in self.settings.items()]
        return ", ".join([self.base, self.dtype, *told, f"{self.rows}×{self.tokens} tokens"])


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_word(each)}" for key, each in value.items())
    return "+".join(value) if isinstance(value, list) else str(value)


ALL_LINEAR = {"lora": {"targets": ["all-linear"]}}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "llama 90M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "llama 1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
"""Sizes of Llamas with random weights, which nothing of the estimator was made on."""


def _smollm2(rows: int, tokens: int, **more: Any) -> MeasuredRun:
    dtype = more.pop("dtype", "float32")
    return MeasuredRun(base="smollm2", rows=rows, tokens=tokens, dtype=dtype, settings=more)


def _minilm(rows: int, tokens: int, **more: Any) -> MeasuredRun:
    dtype, task = more.pop("dtype", "float32"), "classification"
    return MeasuredRun(
        base="minilm", rows=rows, tokens=tokens, dtype=dtype, task=task, settings=more
    )


def _random(base: str, rows: int, tokens: int, **more: Any) -> MeasuredRun:
    dtype = more.pop("dtype", "float32")
    return MeasuredRun(base=base, rows=rows, tokens=tokens, dtype=dtype, settings=more)


RUNS = (
    _smollm2(2, 128),
    _smollm2(2, 128, **ALL_LINEAR),
    _smollm2(2, 128, memory="balanced"),
    _smollm2(4, 128, memory="low"),
    _smollm2(1, 384),
    _smollm2(2, 128, packing="off"),
    _smollm2(1, 64, method="full"),
    _smollm2(1, 64, dtype="bfloat16"),
    _minilm(16, 128),
    _minilm(8, 256, memory="low"),
    _minilm(16, 64, method="full"),
    _minilm(16, 128, method="adapter-h"),
    _minilm(16, 64, method="bitfit"),
    _minilm(4, 64, dtype="bfloat16"),
)
"""Runs of the models on which the estimator was made."""
OTHERS = (
    _random("llama 90M", 2, 128),
    _random("llama 90M", 2, 128, memory="balanced", **ALL_LINEAR),
    _random("llama 90M", 4, 128, memory="low"),
    _random("llama 90M", 1, 128, method="full"),
    _random("llama 90M", 1, 256, method="prefix-layer", prefix={"infix": 0}),
    _random("llama 1.1B", 1, 16, dtype="bfloat16"),
)
"""Runs of models on which it was not."""


def random_config(base: str) -> transformers.LlamaConfig:
    """The config of a base of random weights."""
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=1024, **RANDOM[base]
    )


def loaded_base(run: MeasuredRun) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base of a run with its weights, and its tokenizer."""
    if run.base not in RANDOM:
        labels = ("no", "yes") if run.task == "classification" else None
        return load_model(run.base, dtype=run.dtype, task=run.task, labels=labels)
    tokenizer = load_tokenizer(TOKENIZER)
    dtype: torch.dtype = getattr(torch, run.dtype)
    model = transformers.AutoModelForCausalLM.from_config(random_config(run.base), dtype=dtype)
    return model.eval(), tokenizer
