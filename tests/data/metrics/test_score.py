"""Every task's scores through one function."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorakit.data.metrics import ter, triples
from lorakit.data.metrics.meteor.tables import Tables
from lorakit.data.metrics.score import TASKS, score, score_names, scorer
from lorakit.data.metrics.ter import least_ter, tercom_edits
from lorakit.data.metrics.tercom_beam import BEAM, beam_edits
from lorakit.errors import ConfigError, DataError

TABLE = {"types": ["text", "real"], "rows": [["Mill", 3], ["Barn", 5], ["mill", 7]]}


def query(sel: int, agg: int, *conds: list[Any]) -> dict[str, Any]:
    return {"sel": sel, "agg": agg, "conds": list(conds)}


@pytest.mark.parametrize(
    ("output", "form", "result"),
    [
        (query(1, 0, [0, 0, "MILL"], [1, 1, 4]), True, True),
        (query(1, 0, [1, 1, 4], [0, 0, "mill"]), True, True),
        (query(1, 0, [1, 1, "4.0"], [0, 0, "mill"]), False, True),
        (query(1, 1, [0, 0, "mill"]), False, True),
        (query(1, 0, [0, 0, "mill"]), False, False),
        (query(9, 0), False, False),
        ({"error": "no parse"}, False, False),
        (None, False, False),
    ],
)
def test_a_query_is_right_by_form_or_by_result(output: Any, form: bool, result: bool) -> None:
    right = query(1, 0, [0, 0, "mill"], [1, 1, "4"])
    found = score("wikisql", [output], [right], tables=[TABLE])
    assert found == {"logical_form": form, "execution": result}
    assert score("wikisql", [output], [right]) == {"logical_form": form}


def test_a_column_with_two_conditions_is_compared_with_the_last_value() -> None:
    twice = query(0, 0, [1, 1, 6], [1, 1, 4])
    assert score("wikisql", [twice], [query(0, 0, [1, 1, 4])], tables=[TABLE])["execution"] == 1


def test_glue_takes_numbers_and_names() -> None:
    assert score("mrpc", ["equivalent", 0, "1"], [1, 1, 1]) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(0.8),
    }
    # tp 2, fn 1, fp 0, tn 1.
    matthews = 2 * 1 / math.sqrt(2 * 3 * 1 * 2)
    assert score("cola", [1, 1, 0, 0], [1, 1, 1, 0])["matthews"] == pytest.approx(matthews)
    assert score("stsb", [1, 2, 4], ["1", "2", "3"])["spearman"] == pytest.approx(1)
    assert math.isnan(score("stsb", [1, 1], [1, 2])["pearson"])


def test_webnlg_and_dart_take_three_references_or_six(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tables, "paraphrases", lambda _, vocabulary: {})
    outputs = ["The Mill is in Ñandú-town.", "It is old."]
    references = [["x y", "x", "y", "the mill is in Nandu - town ."], ["It is very old."]]
    official = score("webnlg", outputs, references)
    paper = score("webnlg", outputs, references, variant="paper")
    assert set(official) == set(paper) == {"bleu", "meteor", "ter"}
    # Of the second output one word of five is missing; the first has nothing right in three.
    assert paper["ter"] == pytest.approx((1 / 8 + 1 / 5) / 2)
    assert official["ter"] == pytest.approx((8 + 1) / (4 / 3 + 5))
    assert score("dart", outputs[1:], references[1:])["ter"] == pytest.approx(1 / 5)
    assert triples._cut("a-b. c") == "a - b . c"


@pytest.mark.parametrize("variant", ["official", "paper"])
def test_seen_and_unseen_categories_have_scores_of_their_own(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tables, "paraphrases", lambda _, vocabulary: {})
    outputs = ["the mill is in the old town .", "it is very old", "a b c d e"]
    references = [["the mill is in old town ."], ["it was very old"], ["a b c d"]]
    scores = score("webnlg", outputs, references, variant=variant, seen=[True, False, True])
    assert set(scores) == set(score_names("webnlg"))
    for part, end in (((0, 2), "_seen"), ((1,), "_unseen")):
        chosen = ([side[number] for number in part] for side in (outputs, references))
        alone = score("webnlg", *chosen, variant=variant)
        assert {name: scores[f"{name}{end}"] for name in alone} == pytest.approx(alone)
    all_seen = score("webnlg", outputs, references, variant=variant, seen=[True] * 3)
    assert all_seen["bleu_seen"] == all_seen["bleu"]
    assert "bleu_unseen" not in all_seen


@given(
    st.lists(st.sampled_from("abcde"), max_size=9),
    st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=9), min_size=1, max_size=3),
)
def test_the_papers_ter_is_pyters(output: list[str], references: list[list[str]]) -> None:
    pyter = pytest.importorskip("pyter")
    assert least_ter(output, references) == min(pyter.ter(output, known) for known in references)


def plain_edits(output: list[str], reference: list[str]) -> list[list[int]]:
    """The table of edit distances."""
    table = [[*range(len(reference) + 1)]]
    for row, word in enumerate(output, start=1):
        table.append([row])
        for column, other in enumerate(reference):
            diagonal = table[-2][column] + (word != other)
            table[-1].append(min(diagonal, table[-2][column + 1] + 1, table[-1][column] + 1))
    return table


def tercom_slowly(output: list[str], reference: list[str]) -> int:
    """tercom's search, every shift tried with a table of its own."""
    edits = plain_edits(output, reference)[-1][-1]
    for shifts in range(len(output) + 1):
        tried = list(shifts_of(output, reference))
        found = [(plain_edits(words, reference)[-1][-1], -length) for length, words in tried]
        if not found or min(found)[0] >= edits:
            return edits + shifts
        edits, output = min(found)[0], tried[found.index(min(found))][1]
    raise AssertionError("each shift saves an edit")


def shifts_of(output: list[str], reference: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Each shift that tercom tries: the phrase's length, and the words after it."""
    table, aligned = plain_edits(output, reference), [-1] * len(reference)
    wrong, wrong_there = set(range(len(output))), set(range(len(reference)))
    row, column = len(output), len(reference)
    while row or column:
        here = table[row][column]
        same = row > 0 < column and output[row - 1] == reference[column - 1]
        if row > 0 < column and table[row - 1][column - 1] + (not same) == here:
            row, column = row - 1, column - 1
            aligned[column] = row
            if same:
                wrong.remove(row)
                wrong_there.remove(column)
        elif row and table[row - 1][column] + 1 == here:
            row -= 1
        else:
            column -= 1
            aligned[column] = row - 1
    for start in range(len(output)):
        for stop in range(start + 1, min(start + 10, len(output)) + 1):
            own = range(start, stop)
            phrase = output[start:stop]
            places = [
                at for at in range(len(reference)) if reference[at : at + len(phrase)] == phrase
            ]
            if places and not wrong & {*own}:
                continue
            free = [at for at in places if aligned[at] not in own]
            for at in free:
                if not wrong_there & {*range(at, at + len(phrase))}:
                    continue
                for other in range(at - 1, at + len(phrase)):
                    after = aligned[other] if other >= 0 else -1
                    if other >= 0 and (after == start or (other != at and after == aligned[at])):
                        continue
                    yield len(phrase), shifted(output, start, stop, after)
            if not free:
                break


def shifted(words: list[str], start: int, stop: int, after: int) -> list[str]:
    if after < start:
        before = words[: after + 1]
        return before + words[start:stop] + words[after + 1 : start] + words[stop:]
    at = after + 1 if after >= stop else stop + after - start
    return words[:start] + words[stop:at] + words[start:stop] + words[at:]


WORDS = st.lists(st.sampled_from("abcde"), max_size=10)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=2))
def test_the_official_ter_is_tercoms(output: list[str], references: list[list[str]]) -> None:
    expected = min(tercom_slowly(output, known) for known in references)
    assert tercom_edits(output, references) == expected


@given(WORDS, WORDS)
def test_tercoms_beam_changes_nothing_of_what_is_near(
    output: list[str], reference: list[str]
) -> None:
    assert beam_edits(output, reference)[0] == plain_edits(output, reference)[-1][-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ter, "BEAM", -1)  # so that all goes through it
        assert tercom_edits(output, [reference]) == tercom_slowly(output, reference)


def test_tercom_loses_matches_that_are_more_than_20_words_away() -> None:
    output = ["x", "y", "z"]
    for missing, edits in ((20, 20), (21, 21), (22, 25), (30, 33)):
        reference = [str(number) for number in range(missing)] + output
        assert plain_edits(output, reference)[-1][-1] == missing
        assert tercom_edits(output, [reference]) == edits


PHRASES = st.lists(
    st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=5), min_size=2, max_size=6
).flatmap(lambda phrases: st.tuples(st.just(phrases), st.permutations(phrases)))


@pytest.mark.thorough
@settings(max_examples=25)
@given(PHRASES)
def test_both_ters_of_phrases_that_have_moved_are_those_of_the_slow_searches(
    phrases: tuple[list[list[str]], list[list[str]]],
) -> None:
    pyter = pytest.importorskip("pyter")
    reference, output = ([word for phrase in each for word in phrase] for each in phrases)
    assert least_ter(output, [reference]) == pyter.ter(output, reference)
    assume(plain_edits(output, reference)[-1][-1] <= BEAM)
    assert tercom_edits(output, [reference]) == tercom_slowly(output, reference)


def test_the_best_of_several_summaries_counts() -> None:
    found = score("samsum", ["the cats sat"], [["the cat sat", "nothing"]])
    assert found["rouge1"] == found["rouge_l"] == 1


def test_what_made_a_score_has_a_name() -> None:
    assert "variant python" in scorer("e2e")
    assert "variant paper" in scorer("dart", "paper")
    assert all("version" in scorer(task) for task in TASKS)


@pytest.mark.parametrize(
    ("words", "kwargs", "error", "message"),
    [
        (("e2", ["a"], [["a"]]), {}, ConfigError, "did you mean 'e2e'"),
        (("e2e", ["a"], [["a"]]), {"variant": "paper"}, ConfigError, "python and perl"),
        (("sst2", [1], [1]), {"variant": "paper"}, ConfigError, "has no variants"),
        (("e2e", [], []), {}, DataError, "0 outputs and 0 references"),
        (("e2e", ["a"], [["a"], ["b"]]), {}, DataError, "1 outputs and 2 references"),
        (("e2e", ["a", None, "b"], [[], ["x"], "y"]), {}, DataError, "3 problems"),
        (("mrpc", [2, "same"], [0, 1]), {}, DataError, "not_equivalent, equivalent"),
        (("stsb", ["high"], [1]), {}, DataError, "Not a score"),
        (("wikisql", [None], [query(0, 0)]), {"tables": []}, DataError, "1 outputs and 0 tables"),
        (("webnlg", ["a"], [["a"]]), {"seen": []}, DataError, "1 outputs and 0 marks"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    words: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        score(*words, **kwargs)
