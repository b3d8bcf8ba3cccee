"""The runs and servers whose memory is measured beside its estimate, and bases for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    processes: int = 1
    """That train together, and share the rows."""
    steps: int | None = None
    """Optimizer steps of its own; None: as many as the others."""

    @property
    def name(self) -> str:
        """The run in words."""
        told = [f"{key} {_word(value)}" for key, value in self.settings.items()]
        told += [f"{self.processes} processes"] if self.processes > 1 else []
        told += [f"{self.steps} steps"] if self.steps else []
        return ", ".join([self.base, self.dtype, *told, f"{self.rows}×{self.tokens} tokens"])


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """One server: its base, and what it holds at once."""

    base: str
    slots: int
    tokens: int
    """Of prompt and answer together, in every slot."""
    adapters: int
    """In memory, in rotation over the slots."""
    kept_bytes: int
    """Memory of prompts that were read, which fills up; 0: none are kept."""
    rounds: int = 1
    """How many times all slots are filled."""
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """The server in words."""
        kept = [f"{self.kept_bytes // 10**6} MB of kept prompts"] if self.kept_bytes else []
        adapters = f"{self.adapters} adapter{'s' if self.adapters > 1 else ''}"
        size = f"{self.slots} slots of {self.tokens} tokens"
        return ", ".join([self.base, self.dtype, size, adapters, *kept])


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
    replace(_random("llama 1.1B", 1, 16, dtype="bfloat16"), steps=20),
)
"""Runs of models on which it was not."""
TOGETHER = (
    replace(_smollm2(4, 128), processes=2),
    replace(_smollm2(4, 128, **ALL_LINEAR), processes=2),
    replace(_smollm2(4, 128, shard="base"), processes=2),
    replace(_smollm2(4, 128, shard="base", memory="low"), processes=2),
)
"""Runs of several processes, of which each is measured."""


def _server(slots: int, tokens: int, adapters: int, **more: Any) -> ServedRun:
    kept = {"kept_bytes": 0, **more}
    return ServedRun(base="smollm2", slots=slots, tokens=tokens, adapters=adapters, **kept)


SERVERS = (
    _server(4, 256, 1),
    _server(8, 512, 4),
    _server(16, 128, 16),
    _server(4, 1024, 2),
    _server(4, 256, 4, kept_bytes=100_000_000, rounds=3),
)
"""Servers, each with all its slots full."""


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
