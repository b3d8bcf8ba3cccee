"""Real models with adapters made in lorakit and in PEFT: the same logits in both."""

import itertools
from typing import Any

import peft
import pytest
import torch

import lorakit as lk
from references import outputs, randomise

# PEFT asks transformers by a name that 5.23 has replaced.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PROMPT = "The nearest library to the harbour opens at"


def load(name, task, *, seed=0):
    """A real model, whose classifier, if it has one, depends on the seed; and a batch."""
    torch.manual_seed(seed)
    labels = ("no", "yes") if task == "classification" else None
    model, tokenizer = lk.load_model(name, task=task, labels=labels)
    return model, dict(tokenizer(PROMPT, return_tensors="pt"))


def randomise_peft(model):
    """Move what PEFT trains away from its start, B from zero too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def train_in_peft(model, inputs):
    """Take two steps of AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    generation = model.peft_config["default"].task_type == "CAUSAL_LM"
    labels = inputs["input_ids"] if generation else torch.tensor([1])
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "task", "config"),
    [
        pytest.param(
            *("smollm2", "generation", {"rank": 8, "alpha": 16, "targets": ("q", "v")}),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "smollm2",
            "generation",
            {"targets": ("all-linear",), "rank_pattern": {"q": 4}, "use_rslora": True},
            marks=pytest.mark.thorough,
        ),
        ("minilm", "classification", {"targets": ("attention",), "bias": "lora"}),
    ],
)
def test_an_adapter_made_here_gives_the_same_logits_in_peft(name, task, config, tmp_path):
    model, inputs = load(name, task)
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


CONFIGS: dict[str, Any] = {
    "smollm2": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "smollm2-patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 4, r"layers\.1\d\.mlp\.up_proj": 3},
        "use_rslora": True,
    },
    "minilm-head": {"target_modules": ["query", "value"], "bias": "lora_only"},
}


MADE = itertools.product(CONFIGS, ["randomised", "trained"])
SHOWN = (("minilm-head", "randomised"),)
"""In `make test`: the real models cost seconds, and tiny ones have every config."""


@pytest.mark.parametrize(
    ("made", "change"),
    [pytest.param(*m, marks=() if m in SHOWN else pytest.mark.thorough) for m in MADE],
)
def test_an_adapter_of_peft_gives_the_same_logits_here(made, change, tmp_path):
    name, config = made.partition("-")[0], CONFIGS[made]
    task = "generation" if name == "smollm2" else "classification"
    task_type = "CAUSAL_LM" if task == "generation" else "SEQ_CLS"
    model, inputs = load(name, task)
    base = outputs(model, inputs)
    theirs = peft.get_peft_model(model, peft.LoraConfig(**config, task_type=task_type))
    if change == "trained":
        train_in_peft(theirs, inputs)
    else:
        randomise_peft(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    expected = outputs(theirs, inputs)
    adapter = lk.Adapter.load(tmp_path / "adapter")
    # Another classifier than the one that PEFT trained on: the file's must replace it.
    fresh, _ = load(name, task, seed=1)
    lk.attach(fresh, adapter)
    assert (expected - base).abs().max() > 0.01
    assert (outputs(fresh, inputs) - expected).abs().max() < 1e-5
