"""Checkpointing with routes: where it sits, when it acts, and that it goes.

That gradients are right with it is one of the promises, for every family, and in test_routing.py.
"""

import copy
import pickle
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.layers.checkpointing import RoutedCheckpoint, keep_routes, let_input_require_grad
from references import attach_random, checkpoint_blocks
from tiny_models import build


def routed(model):
    """Whether each block of a tiny llama is checkpointed with its route."""
    return [
        isinstance(getattr(b, "_gradient_checkpointing_func", None), RoutedCheckpoint)
        for b in model.model.layers
    ]


def hooks(model):
    """The number of our hooks on a tiny llama's stack of blocks."""
    return list(model.model._forward_pre_hooks.values()).count(keep_routes)


def run(model):
    return model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False).logits.sum()


@pytest.fixture
def model():
    return build("llama").train()


def enable(model, **settings):
    checkpoint_blocks(model, settings or None)


def test_checkpointing_turned_on_at_any_time_keeps_routes_until_the_last_adapter_goes(model):
    attach_random(model, "upper", layers="1")
    assert hooks(model) == 1
    run(model)
    assert routed(model) == [False, False]
    enable(model)
    run(model)
    assert routed(model) == [False, True]
    attach_random(model, "both", targets=("mlp",))
    run(model)
    assert routed(model) == [True, True]
    theirs = model.model.layers[0]._gradient_checkpointing_func.checkpoint
    lk.detach(model, "upper")
    lk.detach(model, "both")
    assert hooks(model) == 0
    assert model.model.layers[0]._gradient_checkpointing_func is theirs


def test_settings_given_again_count(model):
    attach_random(model)
    enable(model, use_reentrant=False)
    run(model)
    enable(model, use_reentrant=True)
    assert routed(model) == [False, False]
    run(model)
    assert routed(model) == [True, True]
    assert model.model.layers[0]._gradient_checkpointing_func.checkpoint.keywords["use_reentrant"]


def test_the_stack_alone_is_called_and_trains_all_the_same(model):
    attach_random(model, targets=("q",))
    enable(model, use_reentrant=True)
    embedded = torch.randn(1, 3, 32)
    model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state.sum().backward()
    trained = [p for n, p in model.named_parameters() if "lora_" in n]
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_a_route_of_its_own_and_loses_it_alone(model, make):
    attach_random(model)
    enable(model)
    # transformers' own hook can't be pickled.
    model.disable_input_require_grads()
    run(model)
    twin = make(model)
    wrapped = twin.model.layers[0]._gradient_checkpointing_func
    assert wrapped.block is twin.model.layers[0]
    assert wrapped.route is twin._lorakit.route is not model._lorakit.route
    lk.detach(twin)
    assert (hooks(twin), hooks(model)) == (0, 1)
    assert routed(twin) == [False, False]
    assert routed(model) == [True, True]


def test_an_input_is_touched_only_where_nothing_else_makes_a_block_train(model):
    x, block = torch.zeros(1, 3, 32), model.model.layers[0]
    attach_random(model, targets=("q", "v"))
    (changed, mask) = let_input_require_grad(block, (x, None))
    assert changed.requires_grad
    assert mask is None
    assert not x.requires_grad
    assert let_input_require_grad(block, (changed, None))[0] is changed
    with torch.no_grad():
        assert let_input_require_grad(block, (x,))[0] is x
    model.requires_grad_(False)
    assert let_input_require_grad(block, (x,))[0] is x


def test_only_reentrant_checkpointing_touches_an_input(model):
    attach_random(model, targets=("q", "v"))
    for reentrant in (False, True):
        enable(model, use_reentrant=reentrant)
        model.disable_input_require_grads()
        seen: list[Any] = []
        block = model.model.layers[0]
        theirs = block._gradient_checkpointing_func

        def noted(function, *inputs, _theirs=theirs, _seen=seen):
            _seen.append(inputs[0].requires_grad)
            return _theirs(function, *inputs)

        spy: Any = noted
        spy.keywords = theirs.keywords
        block._gradient_checkpointing_func = spy
        run(model).backward()
        assert seen == [reentrant]
