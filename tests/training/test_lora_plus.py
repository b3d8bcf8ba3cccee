"""LoRA+: A and B at rates of their own, read off from what Adam's first steps do."""

import pytest

import lorakit as lk
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.training.run import train

RATE = 1e-3
SECOND_STEP = 0.1 / 0.19 / (0.001 / 0.001999) ** 0.5
"""Adam's second step as a share of the rate, where the first gradient was zero."""


@pytest.fixture
def moved(tiny_llama, prompt_rows, tmp_path):
    """The largest changes of A and of B by so many steps at a constant rate."""

    def run(ratio, steps, out):
        config = TrainConfig(
            model=str(tiny_llama),
            out=tmp_path / out,
            lora=LoRAConfig(rank=4, targets=("all-linear",)),
            data=DataConfig(train=str(prompt_rows)),
            dtype="float32",
            steps=steps,
            warmup_steps=0,
            schedule="constant",
            learning_rate=RATE,
            lora_plus_ratio=ratio,
        )
        trained = train(config)
        model, _ = lk.load_model(str(tiny_llama))
        lk.attach(model, lk.Adapter.load(trained.out))
        return lk.extract(model).tensors

    def compare(ratio):
        one, two = run(ratio, 1, "one"), run(ratio, 2, "two")
        largest = {"a": 0.0, "b": 0.0}
        for name, tensor in one.items():
            # B moves at once, A only when B is no longer zero.
            change = tensor if name.endswith("b") else two[name] - tensor
            largest[name[-1]] = max(largest[name[-1]], change.abs().max().item())
        return largest

    return compare


@pytest.mark.parametrize("ratio", [pytest.param(1.0, marks=pytest.mark.thorough), 8.0])
@pytest.mark.thorough
def test_b_takes_steps_larger_than_those_of_a_by_the_ratio(moved, ratio):
    largest = moved(ratio)
    assert largest["b"] == pytest.approx(RATE * ratio, rel=1e-2)
    assert largest["a"] == pytest.approx(RATE * SECOND_STEP, rel=1e-2)
