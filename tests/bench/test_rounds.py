"""Measurements in rounds, under a clock that only participants move."""

from lorakit.bench.rounds import Participant, Seconds, interleaved


class Clock:
    """A clock that moves by the times of participants alone."""

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


def test_each_participant_runs_once_a_round():
    clock = Clock()
    interleaved(
        {name: Participant(run=clock.taking(name, 1, 1, 1)) for name in ("b", "a")},
        repeats=2,
        clock=clock,
    )
    assert clock.order == ["b", "a"] * 3


def test_every_second_round_is_in_reverse_order_where_requested():
    clock = Clock()
    interleaved(
        {name: Participant(run=clock.taking(name, 1, 1, 1, 1)) for name in "abc"},
        repeats=3,
        there_and_back=True,
        clock=clock,
    )
    assert "".join(clock.order) == "abccbaabccba"


def test_warm_ups_do_not_count():
    clock = Clock()
    found = interleaved(
        {"a": Participant(run=clock.taking("a", 90, 80, 3, 1, 2))},
        repeats=3,
        warm_ups=2,
        clock=clock,
    )
    assert found == {"a": Seconds(rounds=(3.0, 1.0, 2.0))}
    assert (found["a"].median, found["a"].minimum) == (2.0, 1.0)
    assert found["a"].to_json() == {"median": 2.0, "minimum": 1.0, "turns": [3.0, 1.0, 2.0]}


def test_what_surrounds_the_work_is_not_timed():
    clock = Clock()
    participant = Participant(
        run=clock.taking("run", 1),
        before=clock.taking("before", 10),
        after=clock.taking("after", 20),
    )
    found = interleaved({"a": participant}, repeats=1, warm_ups=0, clock=clock)
    assert found["a"].rounds == (1.0,)
    assert clock.order == ["before", "run", "after"]
