"""SST-2 with MiniLM: LoRA with lorakit beside full fine-tuning in a plain loop, on the same rows.

    python benchmarks/sst2.py --data FOLDER [--out benchmarks/results/sst2.json]

FOLDER has train.jsonl and validation.jsonl.

Each method gets the learning rate that does best of two on the same validation rows, so that none
loses by its settings; the table shows all of them.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import get_linear_schedule_with_warmup, set_seed

import lorakit as lk
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.data.samples import Encoded
from lorakit.training.evaluation import scored
from lorakit.training.loss import Loss
from lorakit.training.run import train
from measured import begin, write_result

LORA_RATES = (2e-3, 4e-3)
FULL_RATES = (1e-4, 2e-4)


def data_config(data: Path, rows: int) -> lk.DataConfig:
    """The rows to train on, and those to score."""
    return lk.DataConfig(
        train=str(data / "train.jsonl"),
        validation=str(data / "validation.jsonl"),
        fields={"text": "sentence"},
        train_rows=rows,
        max_length=64,
    )


def lora(config: lk.DataConfig, rate: float, steps: int) -> dict[str, Any]:
    """Train with lorakit, r 8 on every matrix of the blocks."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            lk.TrainConfig(
                model="minilm",
                out=Path(folder) / "run",
                data=config,
                lora=lk.LoRAConfig(rank=8, alpha=16, targets=("attention", "mlp")),
                dtype="float32",
                steps=steps,
                eval_every=steps,
                batch_size=16,
                learning_rate=rate,
            ),
            progress=True,
        )
    return {
        "rate": rate,
        "accuracy": result.scores["accuracy"],
        "parameters": result.parameters,
        "seconds": result.seconds,
    }


def full(config: lk.DataConfig, rate: float, steps: int) -> dict[str, Any]:
    """Train every weight, in a plain loop, in the same order of rows."""
    assert config.train is not None
    assert config.validation is not None
    rows = read_rows(config.train, config, limit=config.train_rows)
    held_out = read_rows(config.validation, config, labels=rows.labels)
    set_seed(0)
    model, tokenizer = lk.load_model("minilm", task="classification", labels=rows.labels)
    training, validation = (encode_rows(each, tokenizer, config) for each in (rows, held_out))
    collate = Collator(tokenizer)
    begun = time.perf_counter()
    _loop(model, training, collate, rate, steps)
    seconds = time.perf_counter() - begun
    loss = Loss("classification")
    found = scored(model, validation.examples, loss=loss, collate=collate, batch_size=64)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "rate": rate,
        "accuracy": found.scores["accuracy"],
        "parameters": parameters,
        "seconds": seconds,
    }


def _loop(model: Any, training: Encoded, collate: Collator, rate: float, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 20, steps)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(training), generator=generator) for _ in range(9)])
    for step in range(steps):
        batch = collate([training[int(index)] for index in order[step * 16 : step * 16 + 16]])
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    """Run all, print all, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    config = data_config(arguments.data, arguments.rows)
    result = begin(arguments.out)
    result |= {"rows": arguments.rows, "steps": arguments.steps}
    result["lora"] = [lora(config, rate, arguments.steps) for rate in LORA_RATES]
    result["full"] = [full(config, rate, arguments.steps) for rate in FULL_RATES]
    for way in ("lora", "full"):
        for run in result[way]:
            print(
                f"{way:5} rate {run['rate']:.0e}  accuracy {run['accuracy']:.4f}"
                f"  parameters {run['parameters']:,}  {run['seconds']:.0f} s"
            )
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
