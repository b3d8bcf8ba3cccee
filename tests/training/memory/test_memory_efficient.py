"""Modules that keep less during a run: which ones, that nothing else changes, and that it ends."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lorakit.training.memory.memory_efficient import MemoryEfficientModule, memory_efficient
from references import attach_random, base_hash, outputs
from tiny_models import build, example_inputs

# Norms, and feed-forward parts with a gate, of two blocks and what follows them.
TAKE_PART = {
    "llama": (5, 2),
    "qwen3": (9, 2),
    "gemma": (0, 2),
    "phi3": (5, 0),
    "t5": (0, 0),
    "gpt2": (0, 0),
    "opt": (0, 0),
    "gpt_neox": (0, 0),
    "bert": (0, 0),
}


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    model(**example_inputs(model)).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.fixture
def model():
    model = build("llama").train()
    attach_random(model, targets=("all-linear",))
    return model


@pytest.mark.parametrize("family", TAKE_PART)
def test_gradients_are_those_of_the_modules_own(family):
    model = build(family).double().train()
    attach_random(model, targets=("all-linear",), dropout=0.1)
    expected = gradients(model)
    with memory_efficient(model) as paths:
        found = gradients(model)
    assert (sum("norm" in p for p in paths), sum("mlp" in p for p in paths)) == TAKE_PART[family]
    assert found.keys() == expected.keys()
    # A norm is in float32 in every model.
    tolerance = 1e-5 if TAKE_PART[family][0] else 1e-12
    for name, gradient in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance * scale)


def test_bfloat16_gradients_differ_by_its_rounding(model):
    model.to(torch.bfloat16)
    expected = gradients(model)
    with memory_efficient(model):
        found = gradients(model)
    for name, gradient in found.items():
        norm = expected[name].float().norm()
        assert (gradient.float() - expected[name].float()).norm() <= 0.02 * norm


def test_values_stay_the_same_bit_for_bit(model):
    inputs = example_inputs(model)

    def values():
        trained = model.train()(**inputs).logits.detach()
        return trained, outputs(model.eval(), inputs)

    expected = values()
    with memory_efficient(model):
        assert all(map(torch.equal, values(), expected))


@pytest.mark.parametrize("fails", [False, True])
def test_classes_and_weights_come_back(model, fails):
    before, weights, names = classes(model), base_hash(model), list(model.state_dict())
    try:
        with memory_efficient(model):
            assert any(isinstance(module, MemoryEfficientModule) for module in model.modules())
            assert list(model.state_dict()) == names
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert classes(model) == before
    assert base_hash(model) == weights


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_not_part_of_the_run(model, make):
    before, expected = classes(model), gradients(model)
    with memory_efficient(model):
        twin = make(model)
        changed = classes(model)
    assert classes(twin) == before == classes(model) != changed
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_norm_or_an_activation_of_another_kind_is_left_alone(model):
    block = model.model.layers[0]

    class Plus(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1e-3

    class Shifted(LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    block.input_layernorm.__class__ = Plus
    block.mlp.__class__ = Shifted
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    model.model.layers[1].input_layernorm.forward = lambda x: x
    model.model.norm.weight.requires_grad_()
    with memory_efficient(model) as paths:
        left = {f"model.layers.{i}.post_attention_layernorm" for i in (0, 1)}
        assert set(paths) == left


def test_a_hook_on_an_activation_goes_on_to_be_called(model):
    seen = []
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with memory_efficient(model) as paths:
        assert "model.layers.0.mlp" not in paths
        assert not seen
        gradients(model)
    assert seen == [(2, 7, 48)]


def test_a_weight_that_begins_to_train_gets_its_gradient(model):
    norm = model.model.layers[1].input_layernorm
    with memory_efficient(model):
        norm.weight.requires_grad_()
        assert gradients(model)["model.layers.1.input_layernorm.weight"].any()
