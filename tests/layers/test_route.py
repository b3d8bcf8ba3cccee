"""The stack of frames: which one is the top, for whom, and until when."""

import copy
import pickle
import threading
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.errors import RouteError
from lorakit.layers.route import Frame, Route
from lorakit.layers.token_positions import TokenPositions
from prefix_reference import prefixed
from references import attach_random
from tiny_models import build

SWITCHED, BLOCK = Frame.of({}, "switched"), Frame.of({}, "block")
POSITIONS = TokenPositions(torch.tensor([[0, -1], [-1, -1]]))


def test_a_frame_never_changes():
    frame: Any = SWITCHED
    with pytest.raises(FrozenInstanceError):
        frame.name = "other"


def test_a_block_is_on_top_until_its_end_and_a_new_bottom_appears_then():
    route = Route(SWITCHED)
    with route.block(BLOCK):
        assert route.top is BLOCK
        route.set_bottom(Frame(name="new"))
        assert route.top is BLOCK
        with pytest.raises(ZeroDivisionError), route.block(Frame()):
            raise ZeroDivisionError
        assert route.top is BLOCK
    assert route.top is route.bottom
    assert route.top.name == "new"


def test_a_switch_in_a_block_keeps_the_number_of_rows_and_ends_with_it():
    route = Route()
    with route.block(replace(BLOCK, rows=4)):
        route.switch(SWITCHED)
        assert (route.top.name, route.top.rows) == ("switched", 4)
    assert route.top.name is None


def test_a_threads_own_frame_is_on_top_in_that_thread_alone():
    route, seen = Route(SWITCHED), []
    with route.own.pushed(route.of_call(POSITIONS)):
        thread = threading.Thread(target=lambda: seen.append(route.top))
        thread.start()
        thread.join(10)
        assert route.top.tokens is POSITIONS
        assert route.top.operations is SWITCHED.operations
    assert seen == [SWITCHED]
    assert route.top is SWITCHED


def test_a_frame_that_a_call_left_behind_does_not_outlast_a_switch():
    # Torch calls no hooks after a KeyboardInterrupt.
    route = Route(SWITCHED)
    route.own.stack.append(route.of_call(POSITIONS))
    route.switch(BLOCK)
    assert route.top is BLOCK


def test_an_interrupted_call_with_virtual_tokens_changes_no_later_answer(monkeypatch):
    model = prefixed("llama")
    attach_random(model, "lora", targets=("q",))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        lk.switch(model, "lora")
        wanted = model(ids).logits
        lk.switch(model, "default")
        with monkeypatch.context() as patch:
            patch.setattr(model.model.norm, "forward", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(ids)
        lk.switch(model, "lora")
        assert torch.equal(model(ids).logits, wanted)


def _interrupted(*args):
    raise KeyboardInterrupt


def test_a_recomputed_block_keeps_its_frame_whatever_the_route_is():
    route = Route(SWITCHED)
    first = replace(route.top, under=None)
    route.switch(BLOCK)
    with route.own.pushed(first):
        assert route.top is first
        # A call inside of it keeps it, too.
        with route.own.pushed(route.of_call(None)):
            assert route.top.name == "switched"
    assert route.top is BLOCK


def test_positions_of_some_rows_are_those_within_the_block():
    route = Route(SWITCHED)
    with route.for_rows(torch.tensor([1])):
        assert route.top is SWITCHED
    with route.own.pushed(route.of_call(POSITIONS)):
        with route.for_rows(torch.tensor([1])):
            assert route.top.tokens.rows_with_tokens() == [False]
        assert route.top.tokens.rows_with_tokens() == [True, False]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_a_copy_has_the_bottom_alone(make):
    route = Route(SWITCHED, 3)
    route.repeats = 2
    with route.block(BLOCK), route.own.pushed(route.of_call(POSITIONS)):
        twin = make(route)
    assert (twin.top.name, twin.below, twin.layers, twin.repeats) == ("switched", (), 3, 1)
    assert twin.own.stack == []


def test_the_merged_adapter_is_the_name_of_a_bottom_without_operations():
    model = build("llama")
    attach_random(model, targets=("q",))
    lk.merge(model, measure=False)
    route = model._lorakit.route
    assert (route.merged, route.top.operations) == ("default", None)
    lk.unmerge(model)
    assert route.merged is None
    assert route.top is model._lorakit.adapters["default"].frame


def test_a_recomputation_in_an_equal_frame_is_none_under_another_route(monkeypatch):
    route = Route(SWITCHED)
    route.check_recomputation()
    monkeypatch.setattr("lorakit.layers.route.in_backward", lambda: True)
    with route.block(replace(SWITCHED, rows=2)):
        route.check_recomputation()
    with route.block(BLOCK), pytest.raises(RouteError, match="the route of the forward pass"):
        route.check_recomputation()
