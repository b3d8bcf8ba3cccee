"""An example of examples/trainers, run with lorakit's adapter and with PEFT's, prints its figures.

python tests/tools/compare.py EXAMPLE MODEL FOLDER
"""

import json
import runpy
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


def figures(found: Any) -> dict[str, list[float]]:
    """The figures of a run's steps by name."""
    return found if isinstance(found, dict) else {"loss": found}


def compare(example: str, model: Path, folder: Path) -> dict[str, dict[str, list[float]]]:
    """The figures of an example with lorakit and with PEFT, from the same A and B."""
    train = runpy.run_path(str(EXAMPLES / f"with_{example}.py"))["train"]
    saves = example in ("accelerate", "lightning")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = AutoModelForCausalLM.from_pretrained(model)
    torch.manual_seed(0)
    lk.attach(ours, lk.LoRAConfig(rank=4, alpha=8, targets="all-linear"))
    for _, each in ours.named_parameters():
        if each.requires_grad:
            torch.nn.init.normal_(each, std=0.1)
    start = lk.extract(ours).save(folder / "start")
    how: dict[str, Any] = {} if saves else {"callbacks": [lk.SaveAdapter()]}
    found = {"lorakit": figures(train(ours, tokenizer, folder / "lorakit", texts=TEXTS, **how))}
    saved = lk.Adapter.load(folder / "lorakit").tensors
    now = lk.extract(ours).tensors
    assert all(torch.equal(saved[name], now[name]) for name in now)
    base = AutoModelForCausalLM.from_pretrained(model)
    theirs = PeftModel.from_pretrained(base, str(start), is_trainable=True)
    how = {"save": False} if saves else {}
    found["peft"] = figures(train(theirs, tokenizer, folder / "peft", texts=TEXTS, **how))
    return found


if __name__ == "__main__":
    example, model, folder = sys.argv[1:]
    print(json.dumps(compare(example, Path(model), Path(folder))))
