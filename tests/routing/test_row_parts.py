"""Batches of some of a route's rows: slots whose content goes on to the next batch, or a route."""

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import require_attachment
from lorakit.errors import RouteError
from lorakit.kernels import choice
from lorakit.routing.row_parts import RouteParts
from lorakit.routing.slots import Slots
from references import attach_random, outputs
from routing.test_stacked_lora import BIASED
from tiny_models import build, example_inputs

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
ALIKE = {
    "one": {"rank": 2},
    "two": {"rank": 3, "use_rslora": True},
    "three": {"rank": 3, "targets": ("q", "v", "down")},
}
ROWS = ["one", None, "two", {"one": 0.5, "three": -1.0}, "three", "one", "two", None]


def adapted(family="llama", **configs):
    model = build(family)
    for seed, (name, config) in enumerate((configs or ALIKE).items()):
        if name == "two" and family in BIASED:
            config = config | {"bias": "lora"}
        attach_random(model, name, seed=seed, std=0.1, **config)
    lk.switch(model, None)
    return model


def check(model, parts, rows, *, of=ROWS, **close):
    """Compare a batch of some rows with each of these rows alone."""
    inputs = example_inputs(model, rows=len(rows))
    with parts.of(rows):
        found = outputs(model, inputs)
    for at, row in enumerate(rows):
        with lk.route(model, of[row]):
            alone = outputs(model, {name: x[at : at + 1] for name, x in inputs.items()})
        torch.testing.assert_close(found[at : at + 1], alone, **(close or CLOSE))


@pytest.fixture
def joins(monkeypatch):
    """The numbers of the slots that were written, in order."""
    written: list[int] = []
    join = Slots.join

    def noted(self, slot, terms):
        written.append(slot)
        join(self, slot, terms)

    monkeypatch.setattr(Slots, "join", noted)
    return written


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_any_rows_in_any_order_answer_as_each_alone(family):
    model = adapted(family)
    with lk.route(model, ROWS):
        parts = RouteParts(model, len(ROWS), at_once=4)
        for rows in ([3, 0], [7, 5, 0, 1], [2, 2, 6, 4], [4], [1, 7], [6, 2, 5, 5], [0, 0, 1]):
            check(model, parts, rows)


def test_a_batch_writes_only_the_slots_that_it_lacks(joins):
    model = adapted()
    with lk.route(model, ROWS):
        parts = RouteParts(model, len(ROWS), at_once=3)
        check(model, parts, [0, 2, 1])
        assert len(joins) == 2
        check(model, parts, [6, 1, 5, 2])
        check(model, parts, [1, 6, 0])
        assert len(joins) == 2
        check(model, parts, [4, 0, 6])
        assert len(joins) == 3
        check(model, parts, [3, 0, 4])
        assert len(joins) == 4


def test_an_unchanged_batch_has_the_same_operations():
    model = adapted()
    with lk.route(model, ROWS):
        parts = RouteParts(model, len(ROWS), at_once=3)
        frames = []
        for rows in ([0, 2, 1], [5, 6, 7], [2, 0, 1]):
            with parts.of(rows):
                frames.append(require_attachment(model).route.frame)
        assert frames[0] is frames[1]
        assert frames[0] is not frames[2]


@pytest.mark.parametrize(
    "configs",
    [
        {"narrow": {"rank": 1}, "wide": {"rank": 16}, "narrower": {"rank": 1, "targets": ("q",)}},
        {"half": {"rank": 2, "dtype": "bfloat16"}, "single": {"rank": 2}},
        {"magnitudes": {"rank": 2, "use_dora": True}, "more": {"rank": 3, "use_dora": True}},
    ],
    ids=["ranks", "precisions", "dora"],
)
def test_what_has_no_place_in_slots_is_routed(configs, joins):
    model = adapted("llama", **configs)
    of = [*configs, None, *configs]
    with lk.route(model, of):
        parts = RouteParts(model, len(of), at_once=4)
        check(model, parts, [2, 0, 1], of=of, rtol=0.02, atol=0.02)
    assert not joins


def test_dora_beside_low_rank_updates_is_in_slots_too(joins):
    configs = {"sum": {"rank": 2}, "magnitudes": {"rank": 2, "use_dora": True}}
    model = adapted("llama", **configs)
    with lk.route(model, [*configs, None]):
        check(model, RouteParts(model, 3, at_once=3), [1, 2, 0, 1], of=[*configs, None])
    assert len(joins) == 2


def test_plain_kernels_and_one_adapter_for_all_need_no_slots(joins):
    model = adapted()
    with choice.use("plain"), lk.route(model, ROWS):
        check(model, RouteParts(model, len(ROWS), at_once=4), [0, 2])
    with lk.route(model, ROWS):
        check(model, RouteParts(model, len(ROWS), at_once=4), [0, 5])
    with lk.route(model, "two"), RouteParts(model, 2, at_once=2).of([1]):
        assert require_attachment(model).route.frame.name == "two"
    assert not joins


def test_virtual_tokens_are_routed(joins):
    model = adapted()
    lk.attach(model, lk.PrefixConfig(prefix=2), name="tokens")
    lk.switch(model, None)
    of = ["one", "tokens", "two"]
    with lk.route(model, of):
        check(model, RouteParts(model, 3, at_once=2), [1, 0], of=of)
        check(model, RouteParts(model, 3, at_once=2), [0, 2], of=of)
    assert not joins


def test_a_route_of_other_rows_is_refused():
    model = adapted()
    with lk.route(model, ["one", "two"]), pytest.raises(RouteError, match="for 2 rows"):
        RouteParts(model, 3, at_once=2)
