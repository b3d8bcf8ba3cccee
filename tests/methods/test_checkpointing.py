"""The hook for reentrant checkpointing: where it sits, when it acts, and that it goes.

That gradients are right with it is one of the promises, for every family.
"""

import copy
import pickle

import pytest
import torch

import lorakit as lk
from lorakit.methods.checkpointing import let_input_require_grad
from oracles import attach_random
from tiny_models import build


def hooked(model):
    """Return how often our hook sits on each block of a tiny llama."""
    counts = [list(b._forward_pre_hooks.values()) for b in model.model.layers]
    return [hooks.count(let_input_require_grad) for hooks in counts]


@pytest.fixture
def model():
    return build("llama").train()


def checkpointed(model, **settings):
    attach_random(model, targets=("q", "v"))
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    return model.model.layers[0]


def test_each_adapted_block_has_one_hook_until_the_last_adapter_goes(model):
    attach_random(model, "upper", layers="1")
    assert hooked(model) == [0, 1]
    attach_random(model, "both", targets=("mlp",))
    assert hooked(model) == [1, 1]
    lk.detach(model, "upper")
    lk.detach(model, "both")
    assert hooked(model) == [0, 0]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_hooks_of_its_own_and_loses_them_alone(model, make):
    attach_random(model)
    twin = make(model)
    lk.detach(twin)
    assert hooked(twin) == [0, 0]
    assert hooked(model) == [1, 1]


def test_only_a_block_that_trains_in_reentrant_checkpointing_is_touched(model):
    x = torch.zeros(1, 3, 32)
    block = checkpointed(model, use_reentrant=True)
    (changed, mask) = let_input_require_grad(block, (x, None))
    assert changed.requires_grad
    assert mask is None
    assert not x.requires_grad
    assert let_input_require_grad(block, (changed, None)) is None
    with torch.no_grad():
        assert let_input_require_grad(block, (x,)) is None
    model.requires_grad_(False)
    assert let_input_require_grad(block, (x,)) is None
    model.requires_grad_(True).eval()
    assert let_input_require_grad(block, (x,)) is None


def test_other_checkpointing_is_left_alone(model):
    block = checkpointed(model, use_reentrant=False)
    assert let_input_require_grad(block, (torch.zeros(1, 3, 32),)) is None
    model.activation_checkpointing_disable()
    assert let_input_require_grad(block, (torch.zeros(1, 3, 32),)) is None
