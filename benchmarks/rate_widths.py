"""How a method's learning rate depends on the width of the base: random models, equal changes.

    python benchmarks/rate_widths.py [--out benchmarks/results/rate_widths.json]

For each method and width: the rate at which so many steps of AdamW on one batch change its logits
by a set share of their size. The slope of the rate against the width, both as logarithms, is the
exponent of the rule of default rates (docs/methods.md). Models are random Llamas of two blocks.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.config.methods import config_of
from measured import begin, write_result

WIDTHS = (64, 128, 256, 512)
METHODS: Mapping[str, tuple[str, Mapping[str, Any], float]] = {
    "lora": ("lora", {}, 5e-3),
    "lora all-linear": ("lora", {"targets": "all-linear"}, 2e-3),
    "full": ("full", {}, 2e-4),
    "adapter-h": ("adapter-h", {}, 2e-3),
    "adapter-l": ("adapter-l", {}, 2e-3),
    "bitfit": ("bitfit", {"add_missing": True}, 5e-3),
    "prefix-embedding": ("prefix-embedding", {"init": "random"}, 5e-2),
    "prefix-layer": ("prefix-layer", {"init": "random"}, 2e-2),
}
"""The method, its settings, and the rate to look from, by the name in the table."""
STEPS, CHANGE = 20, 0.3
ROWS, TOKENS, VOCABULARY = 4, 16, 512
LOOKS = 5
"""Runs with which the rate is approached."""


def base(width: int) -> LlamaForCausalLM:
    """A random Llama of this width."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 64),
        vocab_size=VOCABULARY,
        initializer_range=1 / math.sqrt(width),
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(shape)


def change(width: int, method: str, settings: Mapping[str, Any], rate: float) -> float:
    """The change of a batch's logits by training on it, as a share of their size."""
    model = base(width)
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS))
    lk.attach(model, config_of(method, settings))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model(input_ids=tokens).logits
    return float((after - before).norm() / before.norm())


def rate_of_change(width: int, method: str, settings: Mapping[str, Any], start: float) -> float:
    """The rate that changes logits by `CHANGE`, approached by steps along the last slope."""
    rate, slope = start, 1.0
    earlier: tuple[float, float] | None = None
    for _ in range(LOOKS):
        found = math.log(change(width, method, settings, rate) / CHANGE)
        here = math.log(rate)
        if abs(found) < 0.02:
            break
        if earlier is not None and abs(here - earlier[0]) > 1e-6:
            slope = min(3.0, max(0.5, (found - earlier[1]) / (here - earlier[0])))
        earlier = here, found
        rate = math.exp(here - found / slope)
    return rate


def slope(rates: Sequence[float]) -> float:
    """The exponent of the rate as a power of the width: a least-squares line of logarithms."""
    xs, ys = [math.log(width) for width in WIDTHS], [math.log(rate) for rate in rates]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return rise / sum((x - mean_x) ** 2 for x in xs)


def measured(name: str) -> dict[str, Any]:
    """The row of a method in the table."""
    method, settings, start = METHODS[name]
    rates = []
    for width in WIDTHS:
        start = rate_of_change(width, method, settings, start)
        rates.append(start)
    by_width = {f"{width} wide": rate for width, rate in zip(WIDTHS, rates, strict=True)}
    return {"method": name, "exponent": slope(rates), **by_width}


def main() -> None:
    """Measure, print a line for each method, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    start = begin(out)
    rows = []
    for name in METHODS:
        rows.append(measured(name))
        print(json.dumps(rows[-1]), flush=True)
    how = {"widths": WIDTHS, "steps": STEPS, "change": CHANGE, "rows": ROWS, "tokens": TOKENS}
    result = {"bench": "rate_widths", "settings": how, **start, "tables": {"rates": rows}}
    write_result(out, result)


if __name__ == "__main__":
    main()
