"""When compiling has paid: what the first turn took above a usual one, over what a step saves."""

import pytest

from lorakit.bench.break_even import break_even, start_up, start_ups
from lorakit.bench.train_clock import PARTS, Ended, Ready, Turn
from lorakit.bench.train_processes import Record


def turn(seconds):
    """A turn of four steps."""
    parts = dict.fromkeys(PARTS, 0.0) | {"forward": seconds}
    return Turn(parts=parts, losses=(1.0,) * 4, tokens=1, rows=(1, 2, 3, 4), most_bytes=None)


def record(first, *others):
    return Record(
        ready=Ready(used_bytes=None),
        warm_ups=(turn(first),),
        turns=tuple(map(turn, others)),
        ended=Ended(evaluation_loss=1.0),
    )


EAGER = record(9.0, 7.0, 8.0, 12.0)
COMPILED = record(66.0, 5.0, 7.0, 6.0)


def test_start_up_is_what_the_warm_up_took_above_a_usual_turn():
    assert start_up(EAGER) == pytest.approx(1.0)
    assert start_up(COMPILED) == pytest.approx(60.0)


def test_compiling_has_paid_when_its_steps_have_saved_what_it_took_longer_to_start():
    # A step takes 1.5 s in place of 2 s, and 59 s are to be saved.
    assert break_even(COMPILED, EAGER) == 118


def test_compiling_never_pays_where_it_makes_steps_no_faster():
    assert break_even(record(9.0, 8.0), EAGER) == "never"


def test_compiling_that_costs_nothing_pays_at_once():
    assert break_even(record(5.0, 5.0), EAGER) == 0


def test_each_compiled_contestant_is_compared_with_the_same_one_without():
    records = {"ours": EAGER, "compiled": COMPILED, "peft_compiled": COMPILED}
    ours, compiled, alone = start_ups(records)
    assert (ours["who"], ours["break-even steps"]) == ("ours", None)
    assert (compiled["who"], compiled["break-even steps"]) == ("compiled", 118)
    assert alone["break-even steps"] is None
    assert alone["start-up_s"] == pytest.approx(60.0)
    peft = start_ups({"peft": EAGER, "peft_compiled": COMPILED})[1]
    assert peft["break-even steps"] == 118
