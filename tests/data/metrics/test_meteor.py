"""METEOR 1.5: its normalisation, its alignment and its formula, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.metrics.meteor.align import BEAM, Match, _fixed, align, chunks_of
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


def aligned_slowly(matches: list[list[Match]]) -> list[Match]:
    """The beam search, with each path's words, chunks and distance apart and its matches listed."""
    fixed = _fixed(matches)
    paths: list[tuple[int, int, int, int, int, list[Match]]] = [(0, 0, 0, 0, -1, [])]
    for position, here in enumerate(matches):
        following = []
        for words, chunks, distance, next_, end, chosen in sorted(paths, key=by)[:BEAM]:
            taken = any(match.words >> position & 1 for match in [*chosen, *fixed.values()])
            if taken and position not in fixed:
                following += [(words, chunks, distance, next_, end, chosen)] * (position < next_)
                continue
            for match in here:
                if any(overlap(one, match) for one in chosen):
                    continue
                apart = abs(match.start - match.output_start)
                broken = end not in (-1, match.output_start)
                following.append(
                    (
                        words - match.weight,
                        chunks + broken,
                        distance + apart * (position in fixed),
                        position + match.length,
                        match.output_start + match.output_length,
                        chosen if position in fixed else [*chosen, match],
                    )
                )
                distance += apart
            if position not in fixed:
                following.append((words, chunks + (end != -1), distance, next_ + 1, -1, chosen))
        paths = following or sorted(paths, key=by)[:1]
    ended = [
        (words, chunks + (end != -1), distance, 0, end, chosen)
        for words, chunks, distance, _, end, chosen in sorted(paths, key=by)[:BEAM]
    ]
    chosen = [*fixed.values(), *reversed(min(ended, key=by)[5])]
    return sorted(chosen, key=lambda match: match.start)


def by(path: tuple[int, int, int, int, int, list[Match]]) -> tuple[int, int, int]:
    return path[:3]


def overlap(one: Match, other: Match) -> bool:
    return bool(one.words & other.words or one.output_words & other.output_words)


@given(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcd"), max_size=12),
    st.data(),
)
def test_the_search_is_that_of_paths_told_apart(
    reference: list[str], output: list[str], data: st.DataObject
) -> None:
    matches = [
        [Match.of(0, start, 1, at, 1) for at, other in enumerate(output) if other == word]
        for start, word in enumerate(reference)
    ]
    # Paraphrases of several words, which words of both sides are covered by at once.
    for start, at in data.draw(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)))):
        if start + 2 <= len(reference) and at + 2 <= len(output):
            matches[start].append(Match.of(3, start, 2, at, data.draw(st.integers(1, 2))))
    assert align(matches) == aligned_slowly(matches)


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
