"""An example of examples/trainers, run with lorakit's adapter and with PEFT's, prints its figures.

python tests/tools/compare.py EXAMPLE MODEL FOLDER
"""

import json
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk

EXAMPLES = Path(__file__).parents[2] / "examples" / "trainers"
WORDS = ("red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "bird", "fish")
TEXTS = [f"{a} {b} {c}" for a in WORDS[:3] for b in WORDS[3:7] for c in WORDS[7:]]
PREFERENCES = [
    {"prompt": f"{prompt}\n", "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in zip(TEXTS[:8], TEXTS[8:16], TEXTS[16:24], strict=True)
]
"""As many as a batch has rows, so that no step has others."""
STEPS = 20
"""Of the example with preferences."""


def figures(found: Any) -> dict[str, list[float]]:
    """The figures of a run's steps by name."""
    return found if isinstance(found, dict) else {"loss": found}


def compare(example: str, model: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The figures of an example with lorakit and with PEFT, from the same A and B.

    Of preferences, those of `lorakit train` too.
    """
    train = runpy.run_path(str(EXAMPLES / f"with_{example}.py"))["train"]
    saves, prefers = example in ("accelerate", "lightning"), example == "trl_dpo"
    texts: Any = PREFERENCES if prefers else TEXTS
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    lk.attach(ours, lk.LoRAConfig(rank=4, alpha=8, targets="all-linear"))
    for _, each in ours.named_parameters():
        if each.requires_grad:
            torch.nn.init.normal_(each, std=0.1)
    start = lk.extract(ours).save(folder / "start")
    how: dict[str, Any] = {} if saves else {"callbacks": [lk.SaveAdapter()]}
    found = {"lorakit": figures(train(ours, tokenizer, folder / "lorakit", texts=texts, **how))}
    saved = lk.Adapter.load(folder / "lorakit").tensors
    now = lk.extract(ours).tensors
    assert all(torch.equal(saved[name], now[name]) for name in now)
    base = AutoModelForCausalLM.from_pretrained(model)
    theirs = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    how = {"save": False} if saves else {}
    if prefers:
        # Else a copy of PEFT's adapter, with which it starts here, would be the reference.
        how["reference"] = AutoModelForCausalLM.from_pretrained(model)
    found["peft"] = figures(train(theirs, tokenizer, folder / "peft", texts=texts, **how))
    if prefers:
        found["lorakit train"] = {"logged": own_losses(model, start, folder)}
        found["lorakit"]["logged"] = logged(found["lorakit"]["loss"])
    return found


def own_losses(model: Path, start: Path, folder: Path) -> list[float]:
    """The losses that `lorakit train` logs of the same rows, from the same A and B."""
    rows = folder / "rows.jsonl"
    # The end of a prompt is lorakit's own separator.
    bare = [{**row, "prompt": row["prompt"].rstrip("\n")} for row in PREFERENCES]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in bare), encoding="utf-8")
    config = lk.TrainConfig(
        model=str(model),
        task="preference",
        out=folder / "own",
        init_from=str(start),
        lora=lk.LoRAConfig(rank=4, alpha=8, targets="all-linear"),
        data=lk.DataConfig(train=str(rows)),
        dtype="float32",
        steps=STEPS,
        batch_size=len(PREFERENCES),
        learning_rate=1e-4,
        warmup_steps=0,
    )
    lk.train(config)
    lines = (folder / "own" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def logged(losses: list[float]) -> list[float]:
    """The losses of all steps as `lorakit train` logs them: the first, then means up to tens."""
    return [statistics.mean(part) for part in (losses[:1], losses[1:10], losses[10:])]


if __name__ == "__main__":
    example, model, folder = sys.argv[1:]
    print(json.dumps(compare(example, Path(model), Path(folder))))
