"""METEOR 1.5: its normalisation, its alignment and its formula, by hand."""

import numpy as np
import pytest

from lorakit.data.metrics.meteor.align import Match, align, chunks_of
from lorakit.data.metrics.meteor.normalize import ALWAYS, BEFORE_NUMBERS, normalized_words
from lorakit.data.metrics.meteor.score import meteor
from lorakit.data.metrics.meteor.tables import Tables, tables


@pytest.fixture
def paraphrases(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """A table of paraphrases of one's own in place of the five million."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    monkeypatch.setattr(Tables, "paraphrases", lambda _, vocabulary: found)
    return found


def test_a_line_is_normalised() -> None:
    prefixes = {"Dr": ALWAYS, "No": BEFORE_NUMBERS}
    lines = {
        "It’s “so-called”, 1,000 seats!": 'it \'s " so called " , 1,000 seats !',
        "Dr. Holm is No. 3. No. It ends.": "dr. holm is no. 3 . no . it ends .",
        "the u.s. team ... waits": "the us team ... waits",
        "a.m. on 5th st. near": "am on 5th st. near",
    }
    for line, words in lines.items():
        assert " ".join(normalized_words(line, prefixes)) == words


def test_an_output_that_is_the_reference_scores_one(paraphrases: object) -> None:
    score, segments = meteor(["the cat sat on the mat"] * 2, [["x", "the cat sat on the mat"]] * 2)
    assert score == 1
    assert segments == [1, 1]


def test_a_score_is_the_formula(paraphrases: object) -> None:
    # "the" and "on" are function words, which weigh 0.25 where others weigh 0.75. Output and
    # reference have three and four words; "the cat" matches as one chunk, "sits" by its stem.
    score, _ = meteor(["the cat sits"], [["the cat sit on"]])
    matched = 0.25 + 0.75 + 0.6 * 0.75
    precision, recall = matched / (0.25 + 0.75 * 2), matched / (0.25 * 2 + 0.75 * 2)
    mean = 1 / (0.15 / precision + 0.85 / recall)
    assert score == pytest.approx(mean * (1 - 0.6 * (1 / 3) ** 0.2))


def test_synonyms_and_paraphrases_match(
    paraphrases: dict[tuple[str, ...], list[tuple[str, ...]]],
) -> None:
    _, (synonym, unrelated) = meteor(["cars", "stones"], [["automobile"], ["automobile"]])
    assert synonym > 0
    assert unrelated == 0
    paraphrases[("kid", "friendly")] = [("for", "families")]
    _, (found,) = meteor(["for families"], [["kid friendly"]])
    assert found > 0


def test_of_all_outputs_the_counts_are_summed(paraphrases: object) -> None:
    # Four content words, of which three match; the perfect segment has no fragment.
    score, _ = meteor(["red car", "blue stone"], [["red car"], ["blue house"]])
    assert score == pytest.approx(3 / 4 * (1 - 0.6 * (1 / 3) ** 0.2))


def test_the_alignment_has_the_fewest_chunks() -> None:
    # "a b a" against "a b": both "a" of the output fit; the first keeps one chunk.
    matches = [
        [Match.of(0, 0, 1, 0, 1), Match.of(0, 0, 1, 2, 1)],
        [Match.of(0, 1, 1, 1, 1)],
    ]
    chosen = align(matches)
    assert [match.output_start for match in chosen] == [0, 1]
    assert chunks_of(chosen) == 1
    assert chunks_of([Match.of(0, 0, 1, 1, 1), Match.of(0, 1, 1, 0, 1)]) == 2


def test_base_forms_are_wordnets() -> None:
    lists = tables()
    assert lists.synsets("children") >= lists.synsets("child")
    assert lists.synsets("houses") >= lists.synsets("house")
    assert not lists.synsets("qwertz")
    assert "the" in lists.function_words
    assert lists.prefixes["Mr"] == ALWAYS


def test_words_that_the_table_lacks_hide_no_paraphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ["big", "large"], np.array([0, 1], np.int32), np.array([[1, 1]], np.uint8)
    monkeypatch.setattr(Tables, "_paraphrase_table", table)
    # Each comes where a word of the table is.
    for absent in ("apple", "cat"):
        found = Tables().paraphrases(["big", "large", absent])
        assert found == {("big",): [("large",)]}
