"""An adapter for a block of work: the model is afterwards as it was found."""

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import AttachError
from references import attach_random, base_hash, outputs
from tiny_models import build, example_inputs


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def inputs(model):
    return example_inputs(model)


@pytest.fixture
def adapter(model):
    attach_random(model, seed=5, targets=("mlp",))
    made = lk.extract(model)
    lk.detach(model)
    return made


def test_a_plain_model_is_plain_again_also_after_an_error(model, inputs, adapter):
    base, before = base_hash(model), outputs(model, inputs)
    with lk.attached(model, adapter) as plan:
        assert plan.parameters == adapter.parameters
        assert not torch.equal(outputs(model, inputs), before)
    with pytest.raises(KeyError), lk.attached(model, lk.LoRAConfig(), trainable=True):
        raise KeyError
    assert not hasattr(model, "_lorakit")
    assert base_hash(model) == base
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_in_use_is_in_use_again_when_nested(model, inputs, adapter):
    attach_random(model, "own")
    own = outputs(model, inputs)
    with lk.attached(model, adapter):
        first = outputs(model, inputs)
        with lk.attached(model, lk.LoRAConfig()), lk.attached(model, adapter, name="inner"):
            lk.switch(model, "own")
            assert torch.equal(outputs(model, inputs), own)
        assert torch.equal(outputs(model, inputs), first)
    assert (adapter_names(model), active_name(model)) == (("own",), "own")
    assert torch.equal(outputs(model, inputs), own)


def test_the_rows_of_an_open_route_are_routed_again(model, inputs, adapter):
    attach_random(model, "one")
    attach_random(model, "two", seed=1)
    choices = ["one", {"one": 0.5, "two": 0.5}]
    with lk.route(model, choices):
        mixed = outputs(model, inputs)
        with lk.attached(model, adapter):
            assert not torch.equal(outputs(model, inputs), mixed)
        assert torch.equal(outputs(model, inputs), mixed)
    assert active_name(model) == "two"


def test_what_was_merged_or_detached_inside_is_undone_once(model, adapter):
    base = base_hash(model)
    with lk.attached(model, adapter):
        lk.merge(model)
    assert base_hash(model) == base
    with lk.attached(model, adapter):
        lk.detach(model)
    assert base_hash(model) == base


def test_an_adapter_that_does_not_fit_leaves_all_as_it_was(model, adapter):
    attach_random(model, "own")
    with (
        pytest.raises(AttachError, match="'own' is attached already"),
        lk.attached(model, adapter, name="own"),
    ):
        raise AssertionError
    assert (adapter_names(model), active_name(model)) == (("own",), "own")
