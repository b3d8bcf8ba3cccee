"""Tasks with labels: rows that cannot be used are all named, and scores are the libraries' own."""

import json

import pytest
from transformers import AutoTokenizer

from lorakit.config.train import DataConfig
from lorakit.data.chat import IGNORED
from lorakit.data.encode import encode_rows
from lorakit.data.metrics.classes import f1_of_sets, scores_of_tags
from lorakit.data.rows import read_rows
from lorakit.errors import DataError


@pytest.fixture
def tokenizer(tiny_bert):
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def written(tmp_path):
    def write(*rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def test_the_first_token_of_a_word_has_its_tag_and_the_others_none(written, tokenizer):
    # "catdog" is unknown to the tokenizer as a whole: "cat\ndog" is three tokens of one word.
    file = written({"words": ["red", "cat\ndog", "big"], "tags": ["O", "B-X", "O"]})
    rows = read_rows(file, DataConfig())
    assert (rows.task, rows.labels) == ("token-classification", ("B-X", "O"))
    (example,) = encode_rows(rows, tokenizer, DataConfig()).examples
    assert [one for one in example.labels if one != IGNORED] == [1, 0, 1]
    assert len(example.labels) == len(example.input_ids) == 5
    short = encode_rows(rows, tokenizer, DataConfig(max_length=2))
    assert short.report.truncated_prompts == 1
    assert short.examples[0].labels == [1, 0]


def test_every_row_that_cannot_be_used_is_named_at_once(written):
    tags = written(
        {"words": ["red", "cat"], "tags": ["O"]},
        {"words": [], "tags": []},
        {"words": ["red", " "], "tags": ["O", "O"]},
        {"words": ["red"], "tags": ["B-Y"]},
    )
    with pytest.raises(DataError) as error:
        read_rows(tags, DataConfig(labels=("O", "B-X")))
    for part in (
        "(4 problems)",
        "line 1: 2 words have 1 tags: each word needs one of its own",
        "line 2: words is [], where a list is needed, of one or more",
        "line 3: word 2 is empty",
        "line 4: unknown label 'B-Y'; the labels are O, B-X",
    ):
        assert part in str(error.value)
    sets = written(
        {"text": "red", "labels": None},
        {"text": "red", "labels": 3},
        {"text": "red", "labels": "a, a"},
        {"text": "red", "labels": []},
    )
    with pytest.raises(DataError) as error:
        read_rows(sets, DataConfig())
    for part in (
        "(3 problems)",
        "line 1: labels are missing; a row of no class has an empty list",
        "line 2: labels is 3, where a list of names is needed, or a text with commas",
        "line 3: labels has a twice",
    ):
        assert part in str(error.value)


def test_entities_count_as_a_whole_and_other_tags_as_classes():
    right = [["B-PER", "I-PER", "O"], ["O", "B-LOC"]]
    found = [["B-PER", "O", "O"], ["O", "B-LOC"]]
    expected = {"accuracy": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert scores_of_tags(found, right) == expected
    assert scores_of_tags([["noun", "verb"]], [["noun", "noun"]]) == {
        "accuracy": 0.5,
        "f1": pytest.approx((2 / 3 + 0) / 2),
    }


def test_sets_of_classes_are_scored_by_decisions_by_classes_and_whole():
    found = f1_of_sets([[1, 0], [1, 1]], [(1.0, 0.0), (0.0, 1.0)])
    assert found == {"f1_micro": 0.8, "f1_macro": pytest.approx((2 / 3 + 1) / 2), "accuracy": 0.5}
