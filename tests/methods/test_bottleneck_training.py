"""Bottlenecks in training: recomputed blocks, saved activations, and dropout."""

import itertools

import pytest
import torch

import lorakit as lk
from covering import covering
from lorakit.attachment.attach import adapter_parameters
from lorakit.training.memory.activation_checkpointing import matmuls, narrow_matmuls, recomputing
from methods.bottleneck_reference import TINY
from references import checkpoint_blocks, outputs, randomise
from tiny_models import build, example_inputs


def gradients(model, inputs, *, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model, "default")}


# Torch says of the blocks below the adapted ones that they get no gradient, which is the aim.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@covering(
    ("family", "variant", "blocks", "reentrant"),
    itertools.product(TINY, ["h", "l"], [None, "1"], [False, True]),
)
def test_recomputed_blocks_drop_the_same_and_have_the_same_gradients(
    family, variant, blocks, reentrant
):
    model = build(family).double().train()
    inputs = example_inputs(model)
    lk.attach(
        model,
        lk.BottleneckConfig(
            variant=variant, size=8, dropout=0.5, layers=blocks, modules_to_save=()
        ),
    )
    randomise(model)
    expected = gradients(model, inputs)
    checkpoint_blocks(model, {"use_reentrant": reentrant})
    model.disable_input_require_grads()
    found = gradients(model, inputs)
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", [narrow_matmuls, matmuls])
@pytest.mark.parametrize("variant", ["h", "l"])
def test_training_with_less_memory_has_the_same_gradients(variant, policy):
    model = build("llama").double().train()
    inputs = example_inputs(model)
    config = lk.BottleneckConfig(variant=variant, size=4, dropout=0.5)
    lk.attach(model, [lk.LoRAConfig(rank=2, targets=("o", "down")), config])
    randomise(model)
    expected = gradients(model, inputs)
    with recomputing(model, policy):
        for _ in range(2):
            for name, gradient in gradients(model, inputs).items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_dropout_follows_the_seed_and_stops_in_eval_mode():
    model = build("llama")
    inputs = example_inputs(model)
    lk.attach(model, lk.BottleneckConfig(size=8, dropout=0.5))
    randomise(model)
    calm = outputs(model, inputs)
    model.train()
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(outputs(model, inputs))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(outputs(model.eval(), inputs), calm)
