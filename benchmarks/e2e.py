"""E2E NLG with SmolLM2-135M: lorakit beside a plain loop around PEFT, same settings, same scorer.

    python benchmarks/e2e.py --data FOLDER [--out benchmarks/results/e2e.json]

FOLDER has train.jsonl and test.jsonl.

Both train with AdamW, a bf16 base, float32 adapters, r 8 on q and v, rows in a random order of
their own; both answer the same test rows greedily. PEFT's loop computes transformers' own loss.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import yaml
from transformers import get_linear_schedule_with_warmup, set_seed

import lorakit as lk
from lorakit.answering.answer import answer
from lorakit.data.batches import pad_token, training_batch
from lorakit.data.encode import encode_prompt, encode_rows
from lorakit.data.metrics.basic import bleu, exact_match
from lorakit.data.row_types import references_of
from lorakit.data.rows import read_rows
from lorakit.training.run import train
from measured import begin, write_result

EXAMPLE = Path(__file__).parent.parent / "examples" / "e2e.yaml"


def settings(data: Path, out: Path, steps: int) -> lk.TrainConfig:
    """The settings of the example, for a copy of the data."""
    values = yaml.safe_load(EXAMPLE.read_text())
    values["data"]["train"] = str(data / "train.jsonl")
    return lk.TrainConfig(**{**values, "out": out, "steps": steps})


def bleu_of(model: Any, tokenizer: Any, config: lk.TrainConfig, data: Path, rows: int) -> float:
    """BLEU of greedy answers to the first test rows, lower case, all references."""
    test = read_rows(str(data / "test.jsonl"), config.data, limit=rows, split="test")
    prompts = [encode_prompt(row, tokenizer, config.data) for row in test.rows]
    answers = answer(model, tokenizer, prompts, max_new_tokens=96, batch_size=25, progress=True)
    references = [references_of(row) for row in test.rows]
    print("example:", answers[0], "| exact:", exact_match(answers, references))
    return bleu(answers, references)


def ours(config: lk.TrainConfig, data: Path, rows: int) -> dict[str, Any]:
    """Train and score with lorakit."""
    result = train(config, progress=True)
    model, tokenizer = lk.load_model(config.model, dtype=config.dtype)
    base = bleu_of(model, tokenizer, config, data, rows)
    lk.attach(model, lk.Adapter.load(config.out))
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    return {
        "base_bleu": base,
        "bleu": bleu_of(model, tokenizer, config, data, rows),
        "losses": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "seconds": result.seconds,
        "parameters": result.parameters,
    }


def peers(config: lk.TrainConfig, data: Path, rows: int) -> dict[str, Any]:
    """Train and score with PEFT in a plain loop."""
    set_seed(config.seed)
    model, tokenizer = lk.load_model(config.model, dtype=config.dtype)
    assert config.data.train is not None
    assert config.steps is not None
    assert config.learning_rate is not None
    assert config.lora.alpha is not None
    encoded = encode_rows(read_rows(config.data.train, config.data), tokenizer, config.data)
    lora = peft.LoraConfig(
        r=config.lora.rank, lora_alpha=int(config.lora.alpha), target_modules=["q_proj", "v_proj"]
    )
    adapted = peft.get_peft_model(model, lora).train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, config.steps)
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(config.seed))
    begun, losses, recent = time.perf_counter(), [], []
    for step in range(config.steps):
        chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
        examples = [encoded[int(index)] for index in chosen]
        loss = adapted(**training_batch(examples, pad_id=pad_token(tokenizer))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step == 0 or (step + 1) % 10 == 0:
            losses.append((step + 1, sum(recent) / len(recent)))
            print(f"peft step {step + 1}: loss {losses[-1][1]:.3f}", flush=True)
            recent = []
    seconds = time.perf_counter() - begun
    return {
        "bleu": bleu_of(adapted, tokenizer, config, data, rows),
        "losses": losses,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in parameters),
    }


def main() -> None:
    """Run both, print both, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(arguments.data, Path(folder) / "run", arguments.steps)
        result = {
            **begin(arguments.out),
            "settings": config.model_dump(mode="json", exclude={"out", "data"}),
            "test_rows": arguments.rows,
            "lorakit": ours(config, arguments.data, arguments.rows),
            "peft": peers(config, arguments.data, arguments.rows),
        }
    for name in ("lorakit", "peft"):
        tail = [loss for _, loss in result[name]["losses"][-5:]]
        print(
            f"{name:8} loss {result[name]['losses'][0][1]:.2f} -> {sum(tail) / len(tail):.2f}"
            f"  BLEU {result[name]['bleu']:.1f}  {result[name]['seconds']:.0f} s"
        )
    print(f"base     BLEU {result['lorakit']['base_bleu']:.1f}")
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
