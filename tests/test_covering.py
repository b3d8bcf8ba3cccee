"""The sample of cases that `make test` runs: every value often enough, the same in each process."""

import itertools
from collections import Counter

import pytest

from covering import chosen, covering, sampled

CASES = list(itertools.product("abcdefg", "vwxyz"))


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("seed", ["one claim", "another"])
def test_every_value_is_in_as_many_cases_as_are_asked_for(seed, each):
    kept = [CASES[at] for at in chosen(CASES, each=each, seed=seed)]
    for place in (0, 1):
        counts = Counter(case[place] for case in kept)
        assert set(counts) == {case[place] for case in CASES}
        assert min(counts.values()) >= each
    assert len(kept) <= (7 + 5) * each


def test_a_value_of_few_cases_keeps_them_all():
    cases = [*CASES, ("rare", "v"), ("pair", "w"), ("pair", "x")]
    assert {35, 36, 37} <= chosen(cases, each=2, seed="")


def test_what_else_a_case_depends_on_is_covered_too():
    kept = chosen(CASES, each=2, seed="", also=lambda first, second: (first, second) == ("g", "z"))
    assert len(CASES) - 1 in kept


def test_each_claim_draws_cases_of_its_own_and_always_the_same():
    assert sorted(chosen(CASES, each=1, seed="a claim")) == EXPECTED
    assert chosen(CASES, each=1, seed="another claim") != set(EXPECTED)


EXPECTED = [2, 4, 8, 11, 15, 20, 23, 28, 33]


def test_all_others_are_marked_thorough_and_none_is_left_out():
    @covering(("first", "second"), CASES)
    def a_claim(first, second):
        pass

    (mark,) = a_claim.pytestmark
    _, parameters = mark.args
    assert [tuple(each.values) for each in parameters] == CASES
    thorough = {at for at, each in enumerate(parameters) if each.marks}
    assert thorough == set(range(len(CASES))) - chosen(CASES, each=1, seed="a_claim")


def test_a_sample_is_a_share_of_the_values_another_for_each_claim():
    values = [*"abcdefghi"]

    def kept(name):
        def claim():
            pass

        claim.__name__ = name
        (mark,) = sampled("value", values)(claim).pytestmark
        assert [each.values[0] for each in mark.args[1]] == values
        return {each.values[0] for each in mark.args[1] if not each.marks}

    assert len(kept("a claim")) == 3
    assert kept("a claim") == kept("a claim") != kept("another claim")


def test_a_value_without_a_lasting_name_is_refused():
    with pytest.raises(AssertionError, match="another name in each process"):
        chosen([(object(),)], each=1, seed="")
