"""Real models with adapters, in lorakit and in PEFT: the same logits."""

import peft
import pytest
import torch

import lorakit as lk
from oracles import outputs, randomise

# PEFT asks transformers by a name that 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPT = "The nearest library to the harbour opens at"


@pytest.mark.parametrize(
    ("name", "task", "config"),
    [
        ("smollm2", "generation", {"rank": 8, "alpha": 16, "targets": ("q", "v")}),
        (
            "smollm2",
            "generation",
            {"targets": ("all-linear",), "rank_pattern": {"q": 4}, "use_rslora": True},
        ),
        ("minilm", "classification", {"targets": ("attention",), "bias": "lora"}),
    ],
)
def test_logits_are_the_same_in_peft(name, task, config, tmp_path):
    torch.manual_seed(0)
    labels = ("no", "yes") if task == "classification" else None
    model, tokenizer = lk.load_model(name, task=task, labels=labels)
    inputs = dict(tokenizer(PROMPT, return_tensors="pt"))
    base = outputs(model, inputs)
    lk.attach(model, lk.LoRAConfig(**config))
    # Small weights, as a trained adapter has: its update is a few per cent of the weight.
    randomise(model, std=0.02)
    ours = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "adapter")
    lk.detach(model)
    theirs = outputs(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"), inputs)
    assert (ours - base).abs().max() > 0.01
    assert (ours - theirs).abs().max() < 1e-5
