"""Tasks with labels: rows that cannot be used are all named, and scores are the libraries' own."""

import json
import math
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from lorakit.config.rows import Format, RowType, TaskName
from lorakit.config.train import DataConfig
from lorakit.data.chat import IGNORED
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_rows
from lorakit.data.metrics.classes import f1_of_sets, scores_of_tags
from lorakit.data.objectives import OBJECTIVES, task_of_base
from lorakit.data.row_types import WRITTEN
from lorakit.data.rows import read_rows
from lorakit.errors import DataError
from lorakit.models.tasks import TASKS


def test_each_task_has_rows_a_model_and_a_line_in_the_docs():
    tasks = set(get_args(TaskName))
    assert tasks == {"generation", *map(task_of_base, OBJECTIVES)} == set(TASKS)
    assert set(get_args(RowType)) | {"auto"} == set(get_args(Format))
    assert {each.kind for each in OBJECTIVES.values()} == set(get_args(RowType)) - set(WRITTEN)
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z-]+)` ", page, flags=re.MULTILINE)) - {"task"} == {
        *tasks,
        *OBJECTIVES,
    }


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
    with pytest.raises(DataError, match="no row has a label, so there is nothing to learn"):
        read_rows(written({"text": "red", "labels": []}), DataConfig())
    with pytest.raises(DataError) as error:
        read_rows(
            written(
                {"text": " ", "label": "a"},
                {"text": "", "text_pair": "", "label": "b"},
                {"text": "", "text_pair": "red", "label": "b"},
            ),
            DataConfig(),
        )
    for part in ("(2 problems)", "line 1: text is empty", "line 2: text and text_pair are empty"):
        assert part in str(error.value)


def test_a_long_context_is_divided_into_windows_that_know_where_the_answer_is(written, tokenizer):
    row = {"question": "big", "context": "red cat blue dog old", "answers": "blue dog"}
    rows = read_rows(written(row), DataConfig())
    data = DataConfig(max_length=4, stride=1)
    examples = encode_rows(rows, tokenizer, data).examples
    assert [tokenizer.decode(each.input_ids) for each in examples] == [
        "big red cat blue",
        "big blue dog old",
    ]
    assert [each.labels for each in examples] == [(0, 0), (1, 2)]
    # The best span of all windows is the answer; a start after its end is none.
    logits = torch.zeros(2, 4, 2)
    logits[1, 1, 0], logits[1, 2, 1], logits[0, 3, 0], logits[0, 1, 1] = 3.0, 3.0, 5.0, 5.0
    objective = OBJECTIVES["question-answering"]
    (answer,) = objective.combined(list(logits), examples)
    assert answer == "blue dog"
    assert objective.scores([answer], examples, names=None) == {"exact_match": 1.0, "f1": 1.0}
    assert objective.scores(["dog"], examples, names=None) == {
        "exact_match": 0.0,
        "f1": pytest.approx(2 / 3),
    }
    with pytest.raises(DataError, match="no room for a context within 2 tokens"):
        encode_rows(rows, tokenizer, DataConfig(max_length=2))


def test_a_question_without_an_answer_is_of_the_first_token(written, tokenizer):
    context = {"question": "big", "context": "red cat blue dog old"}
    file = written(
        context | {"answers": {"text": [], "answer_start": []}, "is_impossible": True},
        context | {"answers": ["dog"]},
        context | {"answers": []},
    )
    rows = read_rows(file, DataConfig())
    examples = encode_rows(rows, tokenizer, DataConfig(max_length=4, stride=1)).examples
    assert [each.labels for each in examples] == [(0, 0), (0, 0), (0, 0), (2, 2), (0, 0), (0, 0)]
    # The first token must be likelier than every span in all windows of a row.
    logits = torch.zeros(6, 4, 2)
    logits[[0, 1, 2], 0] = 2.0
    logits[2, 1], logits[3, 2] = 1.0, 1.5
    logits[4, 0], logits[4, 1], logits[5, 0] = 3.0, 0.5, -1.0
    objective = OBJECTIVES["question-answering"]
    answers = objective.combined(list(logits), examples)
    assert answers == ["", "dog", "red"]
    assert objective.scores(answers, examples, names=None) == {
        "exact_match": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "f1_answerable": 1.0,
        "f1_unanswerable": 0.5,
    }
    # Where every question has an answer, a span is always given.
    assert objective.combined([2 * logits[0], logits[0]], examples[2:4]) != [""]


def test_answers_that_are_not_in_the_context_and_unlike_pairs_are_named(written):
    context = {"question": "big", "context": "red cat"}
    file = written(
        context | {"answers": ["dog"]},
        context | {"answers": {"text": ["cat"], "answer_start": [3]}},
        context | {"answers": None},
        {"question": " ", "context": "red cat", "answers": "cat"},
        context | {"answers": [""]},
        context | {"answers": ["cat"], "is_impossible": True},
    )
    with pytest.raises(DataError) as error:
        read_rows(file, DataConfig())
    for part in (
        "line 1: the answer 'dog' is not in the context",
        "line 2: the answer 'cat' is not in the context at character 3",
        "line 3: answers is missing or no list: a question that the context does not answer has",
        "line 4: question is empty",
        "line 5: an answer is empty: a question without one has an empty list",
        "line 6: it is_impossible, and has an answer",
    ):
        assert part in str(error.value)
    pairs = written(
        {"anchor": "red", "positive": "big", "negative": "cat"},
        {"anchor": "red", "positive": "big"},
    )
    with pytest.raises(DataError, match="line 2: negative is missing, unlike in the first row"):
        read_rows(pairs, DataConfig())
    with pytest.raises(DataError, match="line 1: text_pair is empty"):
        read_rows(written({"anchor": "red", "positive": " "}), DataConfig())


def test_a_text_is_drawn_to_its_own_pair_among_those_of_the_batch(written, tokenizer):
    lines = [{"anchor": "red", "positive": "big", "negative": "cat"}] * 2
    examples = encode_rows(
        read_rows(written(*lines), DataConfig()), tokenizer, DataConfig()
    ).examples
    batch = Collator(tokenizer)(examples)
    assert batch["input_ids"].shape == (6, 1)
    assert batch["labels"].tolist() == [0, 0]
    torch.manual_seed(0)
    anchors, positives, negatives = normalize(torch.randn(3, 2, 4), dim=-1)
    objective = OBJECTIVES["embedding"]
    found = objective.loss(torch.cat([anchors, positives, negatives]), batch["labels"])
    expected = 0.0
    for number, anchor in enumerate(anchors):
        cosines = torch.stack([anchor @ other for other in (*positives, *negatives)])
        expected -= (20 * cosines).log_softmax(0)[number]
    torch.testing.assert_close(found, expected)
    # With numbers only the order of the cosines counts.
    both = torch.cat([anchors, positives])
    a, b = (20 * (anchors * positives).sum(-1)).tolist()
    ranked = objective.loss(both, torch.tensor([3.0, 1.0]))
    assert float(ranked) == pytest.approx(2 * math.log1p(math.exp(b - a)), rel=1e-5)


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
