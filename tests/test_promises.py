"""What lorakit promises of an adapter, for every family of models."""

import copy
import pickle
from typing import Any

import pytest
import torch

import lorakit as lk
from covering import covering, sampled
from references import attach_random, base_hash, checkpoint_blocks, outputs, randomise
from tiny_models import FAMILIES, build, example_inputs

ADAPTED: dict[str, Any] = {"rank": 2, "targets": ("q", "v")}
REENTRANT = {"use_reentrant": True}
CHECKPOINTING: tuple[tuple[dict[str, Any], str | None], ...] = (
    ({}, None),
    (REENTRANT, None),
    (REENTRANT, "1"),
)


@pytest.fixture
def model(request):
    return build(request.param)


families = sampled("model", FAMILIES, indirect=True)


@families
def test_a_fresh_adapter_changes_nothing(model):
    inputs = example_inputs(model)
    lk.attach(copy.deepcopy(model), lk.LoRAConfig(**ADAPTED))
    before = outputs(model, inputs)
    lk.attach(model, lk.LoRAConfig(**ADAPTED))
    assert torch.equal(outputs(model, inputs), before)


@families
def test_only_the_adapter_trains(model):
    plan = lk.attach(model, lk.LoRAConfig(**ADAPTED))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapter_bank.@default." in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == plan.parameters
    randomise(model)
    model(**example_inputs(model)).logits.square().sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == set(trained)


@families
def test_save_and_load_gives_the_same_outputs_bit_for_bit(model, tmp_path):
    inputs = example_inputs(model)
    attach_random(model, **ADAPTED)
    adapted = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    lk.attach(model, lk.Adapter.load(tmp_path / "saved"))
    assert torch.equal(outputs(model, inputs), adapted)


@families
def test_merged_equals_unmerged(model):
    inputs = example_inputs(model)
    attach_random(model, **ADAPTED)
    unmerged = outputs(model, inputs)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), unmerged, rtol=1e-4, atol=2e-5)


@families
def test_detach_gives_the_base_back_bit_for_bit(model):
    inputs = example_inputs(model)
    names, hashed, before = list(model.state_dict()), base_hash(model), outputs(model, inputs)
    classes = [type(module) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    attach_random(model, **ADAPTED)
    lk.merge(model)
    lk.detach(model)
    assert list(model.state_dict()) == names
    assert base_hash(model) == hashed
    assert [type(module) for module in model.modules()] == classes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert torch.equal(outputs(model, inputs), before)


@families
def test_rows_that_choose_adapters_answer_as_if_alone(model):
    inputs = example_inputs(model)
    base = outputs(model, inputs)
    attach_random(model, **ADAPTED)
    adapted = outputs(model, inputs)
    with lk.route(model, ["default", None]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], adapted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-5, atol=1e-5)


@families
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_equal_and_independent(model, make):
    inputs = example_inputs(model)
    attach_random(model, **ADAPTED)
    adapted = outputs(model, inputs)
    twin = make(model)
    assert torch.equal(outputs(twin, inputs), adapted)
    randomise(twin, seed=1)
    lk.switch(twin, None)
    assert torch.equal(outputs(model, inputs), adapted)


# Torch says of the blocks below the adapted ones that they get no gradient, which is the aim.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@covering(
    ("model", "settings", "blocks"),
    [(family, *how) for family in FAMILIES for how in CHECKPOINTING],
    each=1,
    indirect=["model"],
)
def test_gradients_reach_every_part_under_gradient_checkpointing(model, settings, blocks):
    attach_random(model, **ADAPTED, layers=blocks)
    inputs = example_inputs(model)
    model.train()
    torch.manual_seed(0)
    model(**inputs).logits.square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint_blocks(model, settings or None)
    # For text alone, transformers lets the embeddings require grad; ours must not depend on it.
    model.disable_input_require_grads()
    torch.manual_seed(0)
    model(**inputs).logits.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
