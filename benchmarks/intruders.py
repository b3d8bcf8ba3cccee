"""Intruder dimensions of LoRA beside those of full fine-tuning: MiniLM on SST-2, the same rows.

    python benchmarks/intruders.py --data FOLDER [--runs NAME ...] [--out FILE]

FOLDER has train.jsonl and validation.jsonl. Of every trained matrix of the blocks the ten leading
left singular vectors of W + ΔW are compared with all of W's; one whose largest |cosine| is below
0.5 is an intruder (Shuttleworth et al. 2024). Results are added to those that FILE has.
"""

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit.analysis import intruders
from lorakit.analysis.base_weights import BaseWeights
from lorakit.analysis.by_layer import ByLayer
from lorakit.training.run import TrainResult, train
from measured import begin, write_result

ABOUT = {"benchmark": "intruders", "command": "python benchmarks/intruders.py --data FOLDER"}
TOP = 10
THRESHOLD = 0.5
ALL = ("attention", "mlp")
RUNS: dict[str, dict[str, Any]] = {
    "LoRA, r 8 on q and v": {"learning_rate": 3e-3, "lora": {"rank": 8, "targets": ("q", "v")}},
    "LoRA, r 8 on every matrix": {"learning_rate": 2e-3, "lora": {"rank": 8, "targets": ALL}},
    "full fine-tuning": {"learning_rate": 1e-4, "method": "full"},
}
"""The rates are those that did best in benchmarks/sst2.py and default_rates.py."""


def trained(data: Path, settings: dict[str, Any], steps: int, out: Path) -> TrainResult:
    """A run on the first 4,000 rows, scored on the validation rows at its end."""
    config = lk.TrainConfig(
        model="minilm",
        out=out,
        data=lk.DataConfig(
            train=str(data / "train.jsonl"),
            validation=str(data / "validation.jsonl"),
            fields={"text": "sentence"},
            train_rows=4000,
            max_length=64,
        ),
        dtype="float32",
        steps=steps,
        eval_every=steps,
        save_every=steps,
        batch_size=16,
        **settings,
    )
    return train(config, progress=True)


def looked_into(adapter: lk.Adapter) -> dict[str, Any]:
    """The intruders of an adapter's matrices by module, and how large the changes are."""
    model, _ = adapter.load_base()
    changes = BaseWeights(adapter, model, allow_other_base=False).changes()
    sizes = {change.name: change.delta.norm() / change.weight_norm for change in changes}
    found = intruders(adapter, model, top=TOP, threshold=THRESHOLD)
    places = ByLayer.of(found).places
    within = [name for name in found if places[name].layer]
    by_module: dict[str, list[int]] = defaultdict(list)
    for name in within:
        by_module[places[name].module].append(found[name].count)
    return {
        "matrices": len(within),
        "looked_at": sum(len(found[name].cosines) for name in within),
        "intruders": sum(found[name].count for name in within),
        "by_module": {module: sum(counts) for module, counts in by_module.items()},
        "least_cosine": min(min(found[name].cosines) for name in within),
        "median_relative_norm": statistics.median(sizes[name] for name in within),
    }


def main() -> None:
    """Train and look into what is asked for; print and write each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    options = parser.parse_args()
    where = begin(options.out)
    torch.set_num_threads(1)
    before = options.out is not None and options.out.exists()
    runs = json.loads(options.out.read_text())["runs"] if before else {}
    for name in options.runs:
        with tempfile.TemporaryDirectory() as folder:
            result = trained(options.data, RUNS[name], options.steps, Path(folder) / "run")
            found = looked_into(result.adapter)
        runs[name] = {"steps": options.steps, "accuracy": result.scores["accuracy"], **found}
        told = "  ".join(f"{key} {value}" for key, value in runs[name].items())
        print(f"{name}: {told}", flush=True)
        about = {
            "benchmark": "intruders",
            "command": "python benchmarks/intruders.py --data FOLDER",
        }
        limits = {"top": TOP, "threshold": THRESHOLD}
        write_result(options.out, {**about, **limits, "runs": runs, "environment": where})


if __name__ == "__main__":
    main()
