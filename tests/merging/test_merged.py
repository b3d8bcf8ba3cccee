"""A merge for a block of work: weights, and what was in use, are afterwards as they were."""

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import active_name
from lorakit.errors import MergeError
from references import attach_random, base_hash, outputs
from tiny_models import build, example_inputs


@pytest.fixture
def model():
    made = build("llama").to(torch.bfloat16)
    attach_random(made, "one")
    attach_random(made, "two", seed=1, targets=("mlp",))
    return made


def test_the_weights_come_back_bit_for_bit_also_after_an_error(model):
    base = base_hash(model)
    with lk.merged(model, "one") as report:
        assert report.adapter == "one"
        assert base_hash(model) != base
    with pytest.raises(KeyError), lk.merged(model):
        raise KeyError
    assert base_hash(model) == base
    assert active_name(model) == "two"


def test_the_base_is_in_use_again_if_it_was(model):
    inputs = example_inputs(model)
    lk.switch(model, None)
    expected = outputs(model, inputs)
    with lk.merged(model, "one"):
        assert not torch.equal(outputs(model, inputs), expected)
    assert torch.equal(outputs(model, inputs), expected)


def test_a_nested_block_gives_back_the_merge_around_it(model):
    base = base_hash(model)
    with lk.merged(model, "one", round_to=torch.float16):
        around = base_hash(model)
        with lk.merged(model, "two"):
            assert base_hash(model) not in (base, around)
        assert base_hash(model) == around
        with lk.merged(model, "two"):
            lk.unmerge(model)
        assert base_hash(model) == around
        with pytest.raises(MergeError, match="merged already"), lk.merged(model, "one"):
            raise AssertionError
        assert base_hash(model) == around
    assert base_hash(model) == base


def test_it_goes_with_an_adapter_for_the_same_block(model):
    base, adapter = base_hash(model), lk.extract(model, "two")
    with lk.attached(model, adapter), lk.merged(model):
        assert base_hash(model) != base
    assert base_hash(model) == base
    assert active_name(model) == "two"
