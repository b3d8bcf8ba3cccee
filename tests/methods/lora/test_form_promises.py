"""What holds for LoRA, held by its later forms: recomputation, generation, copies, sweeps."""

import copy
from typing import Any

import pytest
import torch

from lorakit.attachment.attach import adapter_parameters
from lorakit.config.train import TrainConfig
from lorakit.routing.route import route
from lorakit.training.memory.memory_setting import training_memory
from references import attach_random, outputs, randomise
from tiny_models import build, example_inputs

FORMS: dict[str, dict[str, Any]] = {
    "freeze-a": {"freeze_a": True},
    "dora": {"use_dora": True, "bias": "lora"},
    "lora-bias": {"lora_bias": True},
    "pissa": {"init": "pissa"},
    "all": {"use_dora": True, "init": "pissa", "freeze_a": True, "use_rslora": True},
}
FAMILY = "gpt2"
"""Its q, k, v are slices of one layer, and its layers have biases and hold weights transposed."""


def attached(form, name="default", model=None):
    model = build(FAMILY) if model is None else model
    attach_random(model, name, rank=2, targets=("q", "v", "up"), **FORMS[form])
    return model


def gradients(model, memory):
    config = TrainConfig(out="unused", memory=memory, lora={"targets": "q"})
    with training_memory(model, config):
        model.train()(**example_inputs(model)).logits.square().sum().backward()
    found = {n: p.grad for n, p in adapter_parameters(model, "default") if p.requires_grad}
    model.zero_grad()
    return found


@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_computed_again_has_the_same_gradients(form, memory):
    model = attached(form)
    model.config.resid_pdrop = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model, "fast")
    for name, gradient in gradients(model, memory).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_generation_with_a_cache_writes_what_it_writes_without(form):
    model = attached(form)
    prompt = example_inputs(model)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_equal_and_independent(form):
    model = attached(form)
    inputs = example_inputs(model)
    before = outputs(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, inputs), before)
    randomise(twin, seed=5)
    assert not torch.equal(outputs(twin, inputs), before)
    assert torch.equal(outputs(model, inputs), before)


def test_rows_of_all_forms_train_together_as_each_alone():
    model = build(FAMILY).double()
    for form in FORMS:
        attached(form, form, model)
    inputs = example_inputs(model, rows=len(FORMS))
    with route(model, list(FORMS)):
        model(**inputs).logits.square().sum().backward()
    together = {f: [p.grad for _, p in adapter_parameters(model, f)] for f in FORMS}
    for row, form in enumerate(FORMS):
        model.zero_grad()
        with route(model, form):
            logits = model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits
        logits.square().sum().backward()
        for found, (_, parameter) in zip(
            together[form], adapter_parameters(model, form), strict=True
        ):
            if parameter.requires_grad:
                torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)
            else:
                assert found is None
