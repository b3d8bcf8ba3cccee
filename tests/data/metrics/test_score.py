"""Every task's scores through one function."""

import math
from typing import Any

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.metrics import triples
from lorakit.data.metrics.meteor.tables import Tables
from lorakit.data.metrics.score import TASKS, score, score_names, scorer
from lorakit.data.metrics.ter import least_ter, tercom_edits
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


def by_sacrebleu(output: list[str], references: list[list[str]]) -> float:
    known = [" ".join(words) for words in references]
    return float(sacrebleu.TER().sentence_score(" ".join(output), known).num_edits)


def by_ours(output: list[str], references: list[list[str]]) -> float:
    return tercom_edits()(" ".join(output), [" ".join(words) for words in references])


@given(
    st.lists(st.sampled_from("abcde"), max_size=30),
    st.lists(st.lists(st.sampled_from("abcde"), max_size=30), min_size=1, max_size=3),
)
def test_the_official_ter_is_tercoms_of_sacrebleu(
    output: list[str], references: list[list[str]]
) -> None:
    assert by_ours(output, references) == by_sacrebleu(output, references)


PHRASES = st.lists(
    st.lists(st.sampled_from("abcdefghijkl"), min_size=1, max_size=6), min_size=2, max_size=8
).flatmap(lambda phrases: st.tuples(st.just(phrases), st.permutations(phrases)))


@pytest.mark.thorough
@settings(max_examples=20)
@given(PHRASES)
def test_both_ters_of_phrases_that_have_moved_are_those_of_the_slow_searches(
    phrases: tuple[list[list[str]], list[list[str]]],
) -> None:
    pyter = pytest.importorskip("pyter")
    reference, output = ([word for phrase in each for word in phrase] for each in phrases)
    assert least_ter(output, [reference]) == pyter.ter(output, reference)
    assert by_ours(output, [reference]) == by_sacrebleu(output, [reference])


@pytest.mark.thorough
@settings(max_examples=12)
@given(PHRASES, st.lists(st.sampled_from("abc"), min_size=30, max_size=70))
def test_the_official_ter_is_tercoms_where_its_band_or_its_patience_ends(
    phrases: tuple[list[list[str]], list[list[str]]], many: list[str]
) -> None:
    reference, output = ([word for phrase in each for word in phrase] for each in phrases)
    for pair in ((output, many), (many, reference), (output + many, many + reference)):
        assert by_ours(pair[0], [pair[1]]) == by_sacrebleu(pair[0], [pair[1]])


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
