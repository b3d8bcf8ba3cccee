"""Forward passes that somebody put on a layer's object: the adapter acts all the same."""

import copy
import functools
import types
import warnings

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.attachment.state import adapter_names
from lorakit.errors import AttachError, MergeError
from references import base_hash, outputs, randomise
from tiny_models import build, example_inputs

CONFIG = lk.LoRAConfig(rank=2, alpha=8, targets=("q", "v"))


def model():
    return build("llama", tie_word_embeddings=False)


INPUTS = example_inputs(model())


@pytest.fixture(scope="module")
def saved():
    """An adapter, and the output of the base with it and without it."""
    plain = model()
    base = outputs(plain, INPUTS)
    lk.attach(plain, CONFIG)
    randomise(plain)
    return lk.extract(plain), outputs(plain, INPUTS), base


def dispatched(model):
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def hooked(model):
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook())
    return model


def patched(model):
    def own(layer, x):
        return F.linear(x, layer.weight, layer.bias)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = types.MethodType(own, module)
    return model


def _call(inner, x):
    return inner(x)


def around(model):
    """A model whose layers' forward passes are each called by somebody's function."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(_call, module.forward)
    return model


PATCHES = {
    "dispatched": dispatched,
    "hooked": hooked,
    "patched": patched,
    "around": around,
    "hooked_patched": lambda model: patched(hooked(model)),
    "patched_around": lambda model: around(patched(model)),
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("before", [True, False], ids=["before_attach", "after_attach"])
def test_the_adapter_acts_once_and_detach_leaves_a_working_base(patch, before, saved):
    adapter, want, base = saved
    patch = PATCHES[patch]
    found = patch(model()) if before else model()
    lk.attach(found, adapter)
    found = found if before else patch(found)
    assert torch.equal(outputs(found, INPUTS), want)
    assert torch.equal(outputs(copy.deepcopy(found), INPUTS), want)
    lk.detach(found)
    assert torch.equal(outputs(found, INPUTS), base)
    lk.attach(found, adapter)
    assert torch.equal(outputs(found, INPUTS), want)


def test_a_bank_routes_rows_on_a_dispatched_model(saved):
    adapter, want, base = saved
    found = dispatched(model())
    bank = lk.AdapterBank(found)
    bank.add("x", adapter)
    with bank.route("x"):
        assert torch.equal(outputs(found, INPUTS), want)
    with bank.route(["x", None]):
        mixed = outputs(found, INPUTS)
    torch.testing.assert_close(mixed[0], want[0])
    torch.testing.assert_close(mixed[1], base[1])


def test_a_dispatched_model_trains_as_a_plain_one():
    gradients = []
    for make in (model, lambda: dispatched(model())):
        found = make()
        lk.attach(found, CONFIG)
        randomise(found)
        found(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        gradients.append([p.grad for p in found.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_hooks_that_go_leave_the_adapter(saved):
    adapter, want, base = saved
    found = hooked(model())
    lk.attach(found, adapter)
    remove_hook_from_module(found, recurse=True)
    assert torch.equal(outputs(found, INPUTS), want)
    lk.detach(found)
    assert torch.equal(outputs(found, INPUTS), base)


def offloaded():
    found = model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerate.cpu_offload(found, execution_device="cpu")
    return found


def test_weights_that_are_offloaded_are_no_reason_for_an_adapter_without_values(saved):
    adapter, want, base = saved
    found = offloaded()
    before = base_hash(model())
    lk.attach(found, adapter)
    assert torch.equal(outputs(found, INPUTS), want)
    with pytest.raises(MergeError, match="the weight is offloaded"):
        lk.merge(found)
    assert torch.equal(outputs(found, INPUTS), want)
    lk.detach(found)
    lk.attach(found, CONFIG)
    assert not any(t.is_meta for t in lk.extract(found).tensors.values())
    assert torch.equal(outputs(found, INPUTS), base)
    remove_hook_from_module(found, recurse=True)
    lk.detach(found)
    assert base_hash(found) == before


@pytest.mark.thorough
def test_layers_that_are_read_from_disk_have_the_adapter(saved, tmp_path):
    adapter, want, base = saved
    model().save_pretrained(tmp_path / "base")
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=tmp_path / "disk"
    ).eval()
    assert found.model.layers[1].self_attn.q_proj.weight.is_meta
    lk.attach(found, adapter)
    assert torch.equal(outputs(found, INPUTS), want)
    lk.detach(found)
    assert torch.equal(outputs(found, INPUTS), base)
    bank = lk.AdapterBank(found)
    bank.add("x", adapter)
    with bank.route("x"):
        assert torch.equal(outputs(found, INPUTS), want)


@pytest.mark.parametrize(
    "config",
    [
        lk.LoRAConfig(targets=("q",), use_dora=True),
        lk.LoRAConfig(targets=("q",), init="pissa", rank=2),
        lk.LoRAConfig(targets=("q",), modules_to_save=("down_proj",)),
    ],
)
def test_what_starts_from_offloaded_weights_is_refused_before_anything_changes(config):
    found = offloaded()
    with pytest.raises(AttachError, match="weights that the adapter needs are offloaded"):
        lk.attach(found, config)
    assert adapter_names(found) == ()


def test_offloaded_layers_read_their_weights_for_dora(saved):
    plain = model()
    lk.attach(plain, lk.LoRAConfig(rank=2, targets=("q",), use_dora=True))
    randomise(plain)
    adapter, want = lk.extract(plain), outputs(plain, INPUTS)
    found = offloaded()
    lk.attach(found, adapter)
    assert torch.equal(outputs(found, INPUTS), want)
