"""LoRA's later forms, each trained from settings to folder."""

import shutil
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.methods.lora.pissa import split_frozen_factors
from lorakit.training.run import train

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
FORMS: dict[str, dict[str, Any]] = {
    "plus": {},
    "orthogonal": {"init": "orthogonal"},
    "freeze-a": {"freeze_a": True},
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "eva": {"init": "eva"},
}
WHOLE, CHECKPOINT = 9, 6


# In `make test` the one that differs most from the others in training.
SHOWN = "pissa"
PARAMETERS = [
    pytest.param(form, marks=() if form == SHOWN else pytest.mark.thorough) for form in FORMS
]


@pytest.fixture(scope="module", params=PARAMETERS)
def run(request, tiny_llama, prompt_rows, tmp_path_factory):
    """The settings of a short run of one form, and its result."""
    config = TrainConfig(
        model=str(tiny_llama),
        out=tmp_path_factory.mktemp("forms") / "run",
        lora=LoRAConfig(rank=4, targets=("q", "head"), **FORMS[request.param]),
        lora_plus_ratio=4.0 if request.param == "plus" else 1.0,
        data=DataConfig(train=str(prompt_rows), train_rows=16),
        dtype="float32",
        steps=WHOLE,
        save_every=3,
        warmup_steps=1,
        learning_rate=5e-2,
        weight_decay=0.1,
    )
    return config, train(config)


@pytest.fixture(scope="module")
def first_loss(tiny_llama, prompt_rows, tmp_path_factory):
    """The loss of the bare base on the first batch."""
    config = TrainConfig(
        model=str(tiny_llama),
        out=tmp_path_factory.mktemp("forms") / "base",
        data=DataConfig(train=str(prompt_rows), train_rows=16),
        dtype="float32",
        steps=1,
        warmup_steps=0,
    )
    return train(config).first_loss


def test_it_starts_where_the_base_is(run, first_loss):
    _, result = run
    assert result.first_loss == pytest.approx(first_loss, rel=1e-5)


def test_a_resumed_run_gives_the_same_bytes(run, tmp_path):
    config, result = run
    config = config.model_copy(update={"out": tmp_path / "resumed", "resume": True})
    shutil.copytree(result.out, config.out)
    shutil.rmtree(config.out / "checkpoints" / f"checkpoint-{WHOLE}")
    train(config)
    for name in FILES:
        assert (config.out / name).read_bytes() == (result.out / name).read_bytes()


def test_all_moves_but_what_does_not_train(run):
    config, result = run
    before = lk.Adapter.load(result.out / "checkpoints" / f"checkpoint-{CHECKPOINT}")
    after = lk.Adapter.load(result.out)
    tensors = (
        split_frozen_factors(before.sites, before.tensors),
        split_frozen_factors(after.sites, after.tensors),
    )
    still = {name for name, tensor in tensors[0].items() if torch.equal(tensor, tensors[1][name])}
    ends = ("lora_a",) if config.lora.freeze_a else ("frozen_a", "frozen_b")
    assert still == {name for name in tensors[0] if name.endswith(ends)}


def test_it_has_learned_and_goes_on_from_there(run, tmp_path):
    config, result = run
    changes = {"out": tmp_path / "second", "init_from": str(result.out), "steps": 2}
    second = train(config.model_copy(update=changes))
    assert second.first_loss < 0.95 * result.first_loss
    before, after = lk.Adapter.load(result.out), lk.Adapter.load(second.out)
    assert (before.sites, before.configs) == (after.sites, after.configs)
