"""STS-B with MiniLM: Spearman's correlation of its embeddings before and after a run of CoSENT.

    python benchmarks/stsb.py --data FOLDER [--out benchmarks/results/stsb.json]

FOLDER has train.jsonl, validation.jsonl and test.jsonl.

The settings are those of examples/stsb.yaml; --rates runs other learning rates beside its own. The
rate that is best by validation counts; test is scored for all of them, and chooses nothing.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import yaml

import lorakit as lk
from measured import begin, write_result

EXAMPLE = Path(__file__).parent.parent / "examples" / "stsb.yaml"
SPLITS = ("validation", "test")


def settings(data: Path) -> dict[str, Any]:
    """The settings of the example, for a copy of the data."""
    values: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    values["data"] |= {name: str(data / f"{name}.jsonl") for name in ("train", "validation")}
    return values


def scores(data: Path, values: dict[str, Any], **what: Any) -> dict[str, dict[str, float]]:
    """The scores of a model, with an adapter or without, on each split."""
    rows = {name: values["data"][name] for name in ("fields", "max_length")}
    return {
        split: lk.evaluate(
            data=lk.DataConfig(validation=str(data / f"{split}.jsonl"), **rows),
            task="embedding",
            batch_size=64,
            **what,
        )
        for split in SPLITS
    }


def trained(data: Path, values: dict[str, Any], rate: float) -> dict[str, Any]:
    """One run at a learning rate, and the scores of its adapter."""
    with tempfile.TemporaryDirectory() as folder:
        config = lk.TrainConfig(**{**values, "out": Path(folder) / "run", "learning_rate": rate})
        result = lk.train(config, progress=True)
        return {
            "rate": rate,
            "steps": result.steps,
            "best_step": result.best_step,
            "parameters": result.parameters,
            "seconds": result.seconds,
            "scores": scores(data, values, adapter=result.out),
        }


def main() -> None:
    """Run all, print all, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates; the example's own")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    values = settings(arguments.data)
    result = begin(arguments.out)
    before = scores(arguments.data, values, model=values["model"])
    rates = arguments.rates or [values["learning_rate"]]
    runs = [trained(arguments.data, values, rate) for rate in rates]
    best = max(runs, key=lambda run: run["scores"]["validation"]["spearman"])
    result |= {"before": before, "runs": runs, "best_rate": best["rate"]}
    lines = {"before": before, **{f"rate {run['rate']:.0e}": run["scores"] for run in runs}}
    for name, found in lines.items():
        print(f"{name:12}", *(f"{split} {found[split]['spearman']:.4f}" for split in SPLITS))
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
