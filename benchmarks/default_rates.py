"""SST-2 with MiniLM at given learning rates: scores on rows to choose by, and on others to report.

    python benchmarks/default_rates.py --data FOLDER --runs lora=3e-3 adapter-l=2e-3 [--out FILE]

FOLDER has train.jsonl and validation.jsonl. Rates are chosen on the last thousand rows of the
training file; the scores on the validation file are reported beside. A run is 300 steps of 16 of
the first 4,000 rows. Results are added to those that FILE has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

import lorakit as lk
from lorakit.attachment.open_model import open_model
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.training.evaluation import scored
from lorakit.training.loss import Loss
from lorakit.training.run import train
from measured import begin, write_result

STEPS, BATCH_SIZE, TRAINING_ROWS, HELD_OUT_ROWS = 300, 16, 4000, 1000


def measured(data: Path, held_out: Path, method: str, rate: float | None) -> dict[str, Any]:
    """Train once, and score both sets of rows.

    Args:
        data: the folder of the training and validation rows.
        held_out: the file of the rows to choose by.
        method: the method's name.
        rate: the peak learning rate. None: the default.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = lk.TrainConfig(
            model="minilm",
            out=Path(folder) / "run",
            method=method,
            data=lk.DataConfig(
                train=str(data / "train.jsonl"),
                fields={"text": "sentence"},
                train_rows=TRAINING_ROWS,
                max_length=64,
            ),
            dtype="float32",
            steps=STEPS,
            batch_size=BATCH_SIZE,
            learning_rate=rate,
        )
        result = train(config)
        scores = {
            name: _scores(result.out, rows)
            for name, rows in (("held-out", held_out), ("validation", data / "validation.jsonl"))
        }
    return {
        "method": method,
        "learning rate": rate or "default",
        "loss in training": result.last_loss,
        **{
            f"{name} {key}": value for name, found in scores.items() for key, value in found.items()
        },
        "time_s": result.seconds,
    }


def _scores(adapter: Path, file: Path) -> dict[str, float]:
    opened = open_model(adapter)
    rows = read_rows(str(file), opened.data, labels=opened.labels)
    examples = encode_rows(rows, opened.tokenizer, opened.data).examples
    collate, loss = Collator(opened.tokenizer), Loss("classification")
    found = scored(opened.model, examples, loss=loss, collate=collate, batch_size=64).scores
    return {"loss": found["loss"], "accuracy": 100 * found["accuracy"]}


def main() -> None:
    """Run what is asked for, one by one; print and write each result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="METHOD=RATE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = begin(options.out)
    torch.set_num_threads(1)
    before = options.out is not None and options.out.exists()
    rows = json.loads(options.out.read_text())["tables"]["rates"] if before else []
    settings = {"steps": STEPS, "batch_size": BATCH_SIZE, "train_rows": TRAINING_ROWS}
    with tempfile.TemporaryDirectory() as folder:
        held_out = Path(folder) / "held_out.jsonl"
        lines = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        held_out.write_text("".join(lines[-HELD_OUT_ROWS:]), encoding="utf-8")
        for run in options.runs:
            method, _, rate = run.partition("=")
            value = float(rate) if rate else None
            rows.append(measured(options.data, held_out, method, value))
            print(json.dumps(rows[-1]), flush=True)
            tables = {"tables": {"rates": rows}}
            write_result(
                options.out, {"bench": "default_rates", "settings": settings, **start, **tables}
            )


if __name__ == "__main__":
    main()
