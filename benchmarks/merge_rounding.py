"""The change that a merge makes to the outputs, over what its rounding alone explains.

    python benchmarks/merge_rounding.py [--out FILE]

`lk.merge` refuses a merge whose ratio is above `lorakit.merging.rounding.LIMIT`. Here the ratio is
measured where nothing is wrong: tiny random models of every architecture that lorakit knows, in
three precisions, with small and large updates of several methods, and several seeds. Beside it
stand the ratios of merges that are wrong in one layer of all, whose update is lost. Five minutes on
one idle core.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.attachment.state import require_attachment
from lorakit.errors import LorakitError
from lorakit.layers.route import Frame
from lorakit.merging import rounding
from lorakit.merging.probe import outputs_on
from lorakit.merging.rounding import LIMIT
from measured import begin, write_result

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_models import FAMILIES, build, example_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0.001, 0.03, 1.0)
"""Standard deviations of the random tensors of an adapter."""
METHODS: dict[str, Any] = {
    "lora": lk.LoRAConfig(rank=4, targets=("all-linear",)),
    "dora": lk.LoRAConfig(rank=4, targets=("all-linear",), use_dora=True),
    "bitfit": lk.BitFitConfig(),
    "full": lk.FullConfig(),
}


def ratios(family: str, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the ratio of each merge, and of one that is wrong."""
    for dtype in DTYPES:
        for method, config in METHODS.items():
            for size in SIZES:
                for seed in range(seeds):
                    model = build(family, seed=seed).to(dtype)
                    with suppress(LorakitError):
                        lk.attach(model, config)
                        setting = {"dtype": str(dtype).removeprefix("torch."), "size": size}
                        yield (
                            {"family": family, "method": method}
                            | setting
                            | found(model, size, seed)
                        )


def found(model: nn.Module, size: float, seed: int) -> dict[str, Any]:
    """The ratio of the merge of a random adapter, and of the same where one layer is wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "default"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    probe = example_inputs(model, seed=seed)
    if "pixel_values" in probe:
        probe["pixel_values"] = probe["pixel_values"].to(model.dtype)
    state = require_attachment(model)
    with lk.route(model, "default"):
        before = outputs_on(model, probe)
    updates = state.adapters["default"].updates
    broken = sorted(updates)[len(updates) // 2]
    with state.route.block(Frame({n: u for n, u in updates.items() if n != broken})):
        wrong = outputs_on(model, probe)
    rounding.LIMIT = float("inf")
    report = lk.merge(model, probe=probe)
    after = outputs_on(model, probe)
    sizes = {each.name: each.rounding_error * each.relative_update for each in report.weights}
    errors = rounding.rounding_errors({n: state.layers[n] for n in updates}, sizes)
    with state.route.own.pushed(Frame(errors)):
        moved = outputs_on(model, probe)
    assert not any(each is None for each in (before, wrong, after, moved))
    expected = rounding.distance(moved, after)
    return {
        "ratio": rounding.distance(before, after) / expected,
        "ratio_without_one_layer": rounding.distance(wrong, after) / expected,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--seeds", type=int, default=2)
    settings = parser.parse_args()
    environment = begin(settings.out)
    rows = [row for family in settings.families for row in ratios(family, settings.seeds)]
    result = {
        "environment": environment,
        "limit": LIMIT,
        "merges": len(rows),
        "largest": max(rows, key=lambda row: row["ratio"]),
        "right": by(rows, "ratio"),
        "one_layer_lost": by(rows, "ratio_without_one_layer"),
    }
    print(*(f"{key}: {value}" for key, value in result.items()), sep="\n")
    write_result(settings.out, result)


def by(rows: list[dict[str, Any]], what: str) -> dict[str, dict[str, float]]:
    """The median and the largest of a ratio, by precision and size of the update."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row['dtype']}, size {row['size']}", []).append(row[what])
    return {
        key: {"median": statistics.median(own), "largest": max(own)} for key, own in groups.items()
    }


if __name__ == "__main__":
    main()
