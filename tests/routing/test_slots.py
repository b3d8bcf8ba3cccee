"""Slots: rows whose adapters come and go answer as under a route made for them."""

import random

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import require_attachment
from lorakit.errors import RouteError
from lorakit.routing.slots import Slots
from references import attach_random, outputs
from routing.test_stacked_lora import BLENDS, CLOSE, NAMES, adapted
from tiny_models import build, example_inputs

HALF = {"rtol": 0.02, "atol": 0.02}


def terms(model, choice):
    """What a choice means: updates with their weights."""
    adapters = require_attachment(model).adapters
    named = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
    return [(adapters[name].updates, weight) for name, weight in named.items()]


def check(model, slots, choices):
    """Compare slots with a route, rows by rows."""
    inputs = example_inputs(model, rows=len(choices))
    with lk.route(model, choices):
        expected = outputs(model, inputs)
    with slots.used(0, len(choices)):
        found = outputs(model, inputs)
    for choice, mine, other in zip(choices, found, expected, strict=True):
        torch.testing.assert_close(mine, other, **(HALF if "half" in (choice or ()) else CLOSE))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_slots_that_change_one_at_a_time_answer_as_a_route(family):
    model = adapted(family)[0]
    slots, choices, draw = Slots(model, 4), [None] * 4, random.Random(0)
    possible = [None, *NAMES, *BLENDS]
    for _ in range(12):
        at, choice = draw.randrange(4), draw.choice(possible)
        slots.join(at, terms(model, choice))
        choices[at] = choice
        check(model, slots, choices)


def test_some_of_the_slots_are_a_batch_too():
    model = adapted("llama")[0]
    slots = Slots(model, 4)
    for at, choice in enumerate(["small", "wide", None, "other"]):
        slots.join(at, terms(model, choice))
    inputs = example_inputs(model, rows=2)
    with lk.route(model, [None, "other"]):
        expected = outputs(model, inputs)
    with slots.used(2, 4):
        torch.testing.assert_close(outputs(model, inputs), expected, **CLOSE)
    with lk.route(model, "wide"):
        alone = outputs(model, {k: v[:1] for k, v in inputs.items()})
    with slots.used(1, 2):
        found = outputs(model, {k: v[:1] for k, v in inputs.items()})
    torch.testing.assert_close(found, alone, **CLOSE)
    for order, choices in (([3, 0], ["other", "small"]), ([1, 3], ["wide", "other"])):
        with lk.route(model, choices):
            expected = outputs(model, inputs)
        with slots.used_by(order):
            torch.testing.assert_close(outputs(model, inputs), expected, **CLOSE)


def test_dora_and_heads_have_no_buffers_and_answer_all_the_same():
    model = build("llama")
    attach_random(model, "dora", seed=1, std=0.1, rank=2, targets=("q", "v"), use_dora=True)
    attach_random(model, "lora", seed=2, std=0.1, rank=3, targets=("q", "down"))
    attach_random(
        model, "head", seed=3, std=0.1, rank=2, targets=("q",), modules_to_save=("lm_head",)
    )
    lk.switch(model, None)
    slots = Slots(model, 4)
    choices = ["dora", "lora", "head", None]
    for at, choice in enumerate(choices):
        slots.join(at, terms(model, choice))
    check(model, slots, choices)
    mixed = {"dora": 0.5, "lora": 0.7}
    slots.join(3, terms(model, mixed))
    slots.join(0, ())
    check(model, slots, [None, "lora", "head", mixed])


def test_ranks_beyond_the_limit_have_no_buffers_and_answer_all_the_same():
    model = adapted("llama")[0]
    slots, choices = Slots(model, 5, most_rank=4), ["wide", "small", None, "wide", "other"]
    for at, choice in enumerate(choices):
        slots.join(at, terms(model, choice))
    check(model, slots, choices)
    assert slots.has_others([0])
    assert not slots.has_others([1, 2])
    assert max(r for own in slots._inputs.values() for r in own.ranks.values()) <= 4
    mixed = {"small": 0.5, "wide": -0.4}
    slots.join(2, terms(model, mixed))
    slots.join(0, ())
    check(model, slots, [None, "small", mixed, "wide", "other"])


def test_a_wide_update_is_computed_in_the_precision_of_the_slots():
    model = build("llama").bfloat16()
    attach_random(model, "wide", seed=1, rank=6, targets=("q", "down"), dtype="float32")
    inputs = example_inputs(model, rows=2)
    found = []
    for most in (None, 4):
        slots = Slots(model, 2, dtype=torch.bfloat16, most_rank=most)
        slots.join(1, terms(model, "wide"))
        with slots.used(0, 2):
            found.append(outputs(model, inputs))
    torch.testing.assert_close(*found, **HALF)
    held = list(slots._wide.values())
    assert held
    assert all(p.dtype == torch.bfloat16 for update in held for p in update.parameters())
    slots.join(0, terms(model, "wide"))
    assert len(slots._wide) == len(held)


def test_in_float64_slots_equal_a_route_to_rounding():
    model = build("llama").double()
    for seed, rank in enumerate((2, 5)):
        targets, dtype = ("all-linear",), "float32"
        attach_random(model, f"r{rank}", seed=seed, rank=rank, targets=targets, dtype=dtype)
    lk.switch(model, None)
    slots = Slots(model, 2)
    slots.join(0, terms(model, "r5"))
    slots.join(1, terms(model, "r2"))
    inputs = example_inputs(model, rows=2)
    with slots.used(0, 2):
        found = outputs(model, inputs)
    for row, name in enumerate(("r5", "r2")):
        with lk.route(model, name):
            alone = outputs(model, {k: v[row : row + 1] for k, v in inputs.items()})
        torch.testing.assert_close(found[row], alone[0], rtol=2e-5, atol=2e-5)


def test_a_step_without_a_change_reuses_the_operations():
    model = adapted("llama")[0]
    slots = Slots(model, 2)
    slots.join(0, terms(model, "wide"))
    with slots.used(0, 2):
        first = require_attachment(model).route.top
    slots.join(1, terms(model, "small"))
    with slots.used(0, 2):
        assert require_attachment(model).route.top is first
    assert require_attachment(model).route.top.operations is None
    assert slots.size_bytes > 0


def test_an_adapter_that_is_gone_answers_in_its_slot():
    model = build("llama")
    attach_random(model, "mine", seed=1, rank=2)
    inputs = example_inputs(model, rows=1)
    with lk.route(model, "mine"):
        expected = outputs(model, inputs)
    slots = Slots(model, 1)
    slots.join(0, terms(model, "mine"))
    attach_random(model, "other", seed=2, rank=2)
    lk.detach(model, "mine")
    with slots.used(0, 1):
        torch.testing.assert_close(outputs(model, inputs), expected, **CLOSE)


def test_virtual_tokens_have_no_slot():
    model = build("llama")
    lk.attach(model, lk.PrefixConfig(prefix=2), name="tokens")
    slots = Slots(model, 1)
    with pytest.raises(RouteError, match="virtual tokens"):
        slots.join(0, terms(model, "tokens"))
    with pytest.raises(RouteError, match="virtual tokens"):
        slots.check(terms(model, "tokens"))
