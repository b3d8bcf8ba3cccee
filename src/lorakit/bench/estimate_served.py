"""What a server's engine takes while all its slots are as long as they may be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.bench.estimate_runs import ServedRun
from lorakit.bench.fresh_process import in_fresh_processes, settled_bytes
from lorakit.bench.memory import forget_peak, most_bytes
from lorakit.bench.peers import save_random_adapters
from lorakit.bench.result import threads
from lorakit.bench.serving.ways import answered
from lorakit.config.estimate import EstimateConfig
from lorakit.estimating.estimate import estimate
from lorakit.models.load import load_model
from lorakit.models.without_weights import load_tokenizer
from lorakit.serving.catalog import Catalog
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits

RANK = 8
"""Of the adapters, which are on all linear layers."""
NEW = 8
"""Tokens of each answer; the rest of a row is its prompt."""


def estimated_server(run: ServedRun) -> int:
    """The memory of a server as it is estimated, in bytes."""
    served: Any = {"slots": run.slots, "max_length": run.tokens, "adapters": run.adapters}
    lora: Any = {"rank": RANK, "targets": ["all-linear"]}
    # What is said of training does not matter, so its rows are short.
    found = estimate(
        EstimateConfig(
            model=run.base,
            dtype=run.dtype,
            row_tokens=16,
            calibrate=False,
            lora=lora,
            serve={**served, "prefix_bytes": run.kept_bytes},
        )
    )
    return found.serving_bytes


def server_bytes(run: ServedRun, count: int | None, variables: dict[str, str]) -> int:
    """The peak of a server in a process of its own, above what it had before the base was loaded.

    Args:
        run: the server, and the requests that fill it.
        count: threads of torch; None: as many as it takes by itself.
        variables: of the environment in which the process begins.

    Raises:
        TrainingError: the system does not tell how much memory a process has.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = (run, Path(folder))
        in_fresh_processes(_save_adapters, [saved], {})
        (taken,) = in_fresh_processes(taken_by_server, [(*saved, count)], variables)
    return taken


def _save_adapters(run: ServedRun, folder: Path) -> None:
    model, _ = load_model(run.base, dtype=run.dtype)
    save_random_adapters(model, folder, count=run.adapters, rank=RANK, dtype="float32")


def taken_by_server(run: ServedRun, folder: Path, count: int | None) -> int:
    """Answer with a server in this process, which should be a fresh one, and measure its peak.

    Args:
        run: the server.
        folder: of its adapters.
        count: threads of torch.

    Raises:
        TrainingError: the system does not tell how much memory a process has.
    """
    with threads(count), tempfile.TemporaryDirectory() as made:
        tiny = ServedRun(base="tiny", slots=1, tokens=2 * NEW, adapters=1, kept_bytes=0)
        first, words = tiny_base()
        save_random_adapters(first, Path(made), count=1, rank=1, dtype="float32")
        _answer(tiny, first, words, Path(made))
        del first
        before = settled_bytes()
        _answer(run, *load_model(run.base, dtype=run.dtype), folder)
        last = most_bytes()
        assert last is not None
        return last - before


def _answer(
    run: ServedRun, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Fill every slot, as many times as it takes until the kept prompts have no more room."""
    limits = Limits(slots=run.slots, max_length=run.tokens, prefix_bytes=run.kept_bytes)
    engine = Engine(model, limits)
    catalog = Catalog(model, tokenizer, "base", folder=folder)
    catalog.load_all()
    settled_bytes()
    forget_peak()
    engine.start()
    generator = torch.Generator().manual_seed(0)
    names = [f"adapter-{row % run.adapters}" for row in range(run.slots)]
    try:
        for _ in range(run.rounds):
            size = (run.slots, run.tokens - NEW)
            ids = torch.randint(engine.vocabulary, size, generator=generator)
            answered(engine, catalog, ids, names, NEW)
    finally:
        engine.close(drain=False)


def tiny_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of one tiny block, with which a process begins."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=49_152, num_hidden_layers=1, **sizes)
    tokenizer = load_tokenizer("smollm2")
    return transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer
