"""Contestants in turns, under a clock that only they move."""

from lorakit.bench.rounds import Contestant, Seconds, interleaved


class Clock:
    """Stands still but for what contestants take."""

    def __init__(self):
        self.now = 0.0
        self.order = []

    def taking(self, name, *seconds):
        """A function that takes so long on its first, second, … call."""
        left = list(seconds)

        def run():
            self.order.append(name)
            self.now += left.pop(0)

        return run

    def __call__(self):
        return self.now


def test_contestants_take_turns_in_their_order():
    clock = Clock()
    interleaved(
        {name: Contestant(run=clock.taking(name, 1, 1, 1)) for name in ("b", "a")},
        repeats=2,
        clock=clock,
    )
    assert clock.order == ["b", "a"] * 3


def test_every_second_time_they_go_backwards_where_asked():
    clock = Clock()
    interleaved(
        {name: Contestant(run=clock.taking(name, 1, 1, 1, 1)) for name in "abc"},
        repeats=3,
        there_and_back=True,
        clock=clock,
    )
    assert "".join(clock.order) == "abccbaabccba"


def test_warm_ups_do_not_count():
    clock = Clock()
    found = interleaved(
        {"a": Contestant(run=clock.taking("a", 90, 80, 3, 1, 2))},
        repeats=3,
        warm_ups=2,
        clock=clock,
    )
    assert found == {"a": Seconds(turns=(3.0, 1.0, 2.0))}
    assert (found["a"].median, found["a"].minimum) == (2.0, 1.0)
    assert found["a"].to_json() == {"median": 2.0, "minimum": 1.0, "turns": [3.0, 1.0, 2.0]}


def test_what_surrounds_a_turn_is_not_timed():
    clock = Clock()
    contestant = Contestant(
        run=clock.taking("run", 1),
        before=clock.taking("before", 10),
        after=clock.taking("after", 20),
    )
    found = interleaved({"a": contestant}, repeats=1, warm_ups=0, clock=clock)
    assert found["a"].turns == (1.0,)
    assert clock.order == ["before", "run", "after"]
