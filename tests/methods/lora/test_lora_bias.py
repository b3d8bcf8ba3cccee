"""A bias of B: the update is scale·(B·A·x + b)."""

import copy

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import attachment_of
from lorakit.errors import AnalysisError, ConfigError, MergeError, TargetError
from lorakit.routing.slots import Slots
from references import alone, attach_random, base_hash, outputs
from tiny_models import build, example_inputs

SETTINGS = {"rank": 3, "alpha": 6, "targets": ("q", "v", "up"), "lora_bias": True}


def test_scale_times_b_is_added_where_the_update_is():
    base = build("gpt2")
    model = copy.deepcopy(base)
    attach_random(model, **SETTINGS)
    adapter = lk.extract(model)
    plain = copy.deepcopy(base)
    for site in adapter.sites:
        a, b, bias = (adapter.tensors[f"{site.name}.lora_{end}"] for end in ("a", "b", "bias"))
        layer = plain.get_submodule(site.path)
        rows = slice(*(site.rows or ((None, None),))[0])
        layer.weight.data[:, rows] += site.scale * (b @ a).T
        layer.bias.data[rows] += site.scale * bias
    inputs = example_inputs(base)
    expected = outputs(plain, inputs)
    assert (expected - outputs(base, inputs)).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_fresh_one_answers_as_before_and_all_of_it_learns():
    model = build("gpt2")
    before = base_hash(model)
    inputs = example_inputs(model)
    expected = outputs(model, inputs)
    plan = lk.attach(model, lk.LoRAConfig(**SETTINGS))
    assert torch.equal(outputs(model, inputs), expected)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained) == lk.extract(model).parameters
    optimizer, losses = torch.optim.SGD(trained, lr=0.5), []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(tensor.abs().sum() > 0 for tensor in lk.extract(model).tensors.values())
    lk.detach(model)
    assert base_hash(model) == before


def test_a_merge_puts_it_into_the_layers_bias_and_gives_it_back():
    model = build("gpt2")
    before, inputs = base_hash(model), example_inputs(model)
    attach_random(model, **SETTINGS)
    expected = outputs(model, inputs)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    lk.unmerge(model)
    lk.detach(model)
    assert base_hash(model) == before


def test_a_layer_without_a_bias_can_have_it_and_cannot_be_merged():
    model = build("llama")
    attach_random(model, **SETTINGS)
    with pytest.raises(MergeError, match=r"no bias that could hold that of B \(lora_bias\)"):
        lk.merge(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rows_and_slots_have_biases_of_their_own(family):
    model = build(family)
    attach_random(model, "one", **SETTINGS)
    attach_random(model, "two", seed=1, **{**SETTINGS, "rank": 2, "targets": "q"})
    inputs = example_inputs(model, rows=3)
    names = ["one", None, {"one": 0.5, "two": 2.0}]
    expected = torch.stack(alone(model, inputs, names))
    with lk.route(model, names):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)
    slots = Slots(model, 3)
    attached = attachment_of(model).adapters
    for slot, terms in enumerate([{"one": 1.0}, {}, {"one": 0.5, "two": 2.0}]):
        slots.join(slot, [(attached[name].updates, weight) for name, weight in terms.items()])
    with slots.used(0, 3):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_bias_of_b_is_refused():
    with pytest.raises(ConfigError, match="lora_bias and use_dora can't be combined"):
        lk.LoRAConfig(lora_bias=True, use_dora=True)
    with pytest.raises(TargetError, match="lora_bias is for linear layers and convolutions"):
        lk.plan(build("llama"), lk.LoRAConfig(targets="embed", lora_bias=True))
    model = build("gpt2")
    attach_random(model, **SETTINGS)
    with pytest.raises(AnalysisError, match="B has a bias, which is no part of ΔW"):
        lk.analysis.compress(lk.extract(model), rank=1)
