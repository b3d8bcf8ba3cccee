import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.config.train import DataConfig
from lorakit.data.row_types import (
    ClassificationRow,
    Message,
    MessagesRow,
    PromptRow,
    Rows,
    TextRow,
    references_of,
)
from lorakit.data.rows import read_rows
from lorakit.errors import DataError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """A function that writes rows to a file and reads it."""

    def write_and_read(rows: list[dict[str, Any]], **settings: Any) -> Rows:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        names = {"limit", "split", "labels", "task", "answered"} & settings.keys()
        options = {name: settings.pop(name) for name in names}
        return read_rows(str(path), DataConfig(**settings), **options)

    return write_and_read


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ({"prompt": "1+1=", "completion": 2}, PromptRow(prompt="1+1=", completion="2")),
        (
            {"prompt": "a", "references": ["b", "c"]},
            PromptRow(prompt="a", completion="b", references=("b", "c")),
        ),
        (
            {"prompt": "a", "messages": TURNS},
            MessagesRow(messages=tuple(Message(**turn) for turn in TURNS)),
        ),
        ({"text": "a", "id": 7}, TextRow(text="a")),
    ],
)
def test_the_kind_of_a_row_is_judged_by_its_fields(
    read: Any, values: dict[str, Any], row: object
) -> None:
    assert read([values]).rows == (row,)


def test_classes_are_told_from_texts_by_their_labels(read: Any) -> None:
    rows = read([{"text": "a", "label": "x"}, {"text": "b", "text_pair": "c", "label": "y"}])
    assert rows.kind == "classification"
    assert rows.rows == (
        ClassificationRow(text="a", label="x"),
        ClassificationRow(text="b", text_pair="c", label="y"),
    )


def test_an_asked_format_beats_the_fields(read: Any) -> None:
    rows = read([{"text": "a", "label": "x"}], format="text")
    assert rows.rows == (TextRow(text="a"),)


def test_fields_rename_columns_and_fill_templates(read: Any) -> None:
    rows = read(
        [{"subject": "Hi", "the body": "There", "n": 3, "reply {x}": "Yes"}],
        fields={"prompt": "{subject}: {the body} ({n})", "completion": "reply {x}"},
    )
    assert rows.rows == (PromptRow(prompt="Hi: There (3)", completion="Yes"),)


def test_filled_in_braces_are_not_filled_again(read: Any) -> None:
    rows = read([{"a": "{b}", "b": "x", "completion": "y"}], fields={"prompt": "{a}{b}"})
    assert rows.rows[0].prompt == "{b}x"


def test_the_limit_and_the_source_are_kept(read: Any) -> None:
    rows = read([{"text": str(i)} for i in range(5)], limit=2)
    assert len(rows) == 2
    assert rows.source.endswith("rows.jsonl")


def test_missing_fields_are_told_with_those_that_are_there(read: Any) -> None:
    with pytest.raises(DataError) as error:
        read([{"question": "a"}, {"question": "b", "answer": "c"}])
    message = str(error.value)
    assert "prompt rows need prompt and completion" in message
    assert "classification rows need text and label" in message
    assert message.splitlines()[-1] == (
        "Its columns are question, answer. Say in data.fields which is which,"
        " as in fields: {prompt: COLUMN, completion: COLUMN} in YAML, or"
        " --data.fields '{prompt: COLUMN, completion: COLUMN}'."
    )


def test_a_misspelt_column_gets_the_nearest(read: Any) -> None:
    with pytest.raises(DataError, match=r"text: there is no column 'sentense'; did you mean 'sent"):
        read([{"sentence": "a", "label": 0}], fields={"text": "sentense"})
    with pytest.raises(DataError, match=r"prompt: there is no column 'bod'; did you mean 'body'"):
        read([{"body": "a", "completion": "b"}], fields={"prompt": "x: {bod}"})
    with pytest.raises(DataError, match=r"text_pair: there is no column 'b'"):
        read([{"text": "a", "label": 0}], fields={"text_pair": "b"})


def test_one_setting_serves_training_files_with_completions_and_tests_with_references(
    read: Any,
) -> None:
    fields = {"prompt": "mr", "completion": "human", "references": "all"}
    train = read([{"mr": "a", "human": "b"}], fields=fields)
    assert train.rows == (PromptRow(prompt="a", completion="b"),)
    assert train.notes == ("no column for references: a completion is its row's only reference",)
    test = read([{"mr": "a", "all": ["b", "c"]}], fields=fields)
    assert test.rows == (PromptRow(prompt="a", completion="b", references=("b", "c")),)
    assert test.notes == ("the first of the references is taken as the completion",)
    with pytest.raises(DataError, match=r"completion: there is no column 'human'"):
        read([{"mr": "a"}], fields=fields)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "a", "completion": None}, "there is no completion; it has prompt"),
        ({"prompt": "a", "completion": ["b"]}, "completion is a list, where a text is needed"),
        ({"prompt": {"x": 1}, "completion": "b"}, "prompt is an object, where a text"),
        ({"prompt": True, "completion": "b"}, "prompt is true or false, where a text"),
        ({"prompt": "\ud800", "completion": "b"}, "prompt has half of a surrogate pair"),
        ({"prompt": "a", "references": [1, None]}, "references is null, where a text"),
    ],
)
def test_unusable_prompt_rows_are_told_by_line(
    read: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=f"line 2: {message}"):
        read([{"prompt": "a", "completion": "b"}, values], format="prompt")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list"),
        ("Hi", "messages must be a list"),
        ([{"who": "human", "says": "Hi"}], "message 1 must have role and content, found who, says"),
        ([TURNS[0], "Hi"], "message 2 must have role and content, found 'Hi'"),
        ([TURNS[0] | {"weight": 1}], "message 1 has weight and is the user's: only the assistant"),
        ([TURNS[0], TURNS[1] | {"weight": 0.5}], "message 2 has weight 0.5, and a turn is trained"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "a part of the content of message",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of message 1 has a part of "),
    ],
)
def test_unusable_messages_are_told_by_line(read: Any, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        read([{"messages": messages}])


def test_all_unusable_rows_are_told_at_once(read: Any) -> None:
    with pytest.raises(DataError, match=r"\(2 problems\):\n  line 1: .*\n  line 3: "):
        read([{"text": None}, {"text": "a"}, {"text": []}], format="text")


def test_empty_completions_are_noted_and_refused_only_if_all_are(read: Any) -> None:
    rows = read([{"prompt": "a", "completion": " "}, {"prompt": "b", "completion": "c"}])
    assert rows.notes == ("empty completions: 1; there the model learns to answer nothing",)
    assert [references_of(row) for row in rows.rows] == [(" ",), ("c",)]
    with pytest.raises(DataError, match=r"all completions are empty \(2 rows\)"):
        read([{"prompt": "a", "completion": " "}, {"prompt": "b", "completion": ""}])


def test_prompts_that_are_only_to_be_answered_need_no_completion(read: Any) -> None:
    assert read([{"prompt": "a"}], answered=False).rows == (PromptRow(prompt="a", completion=None),)
    with pytest.raises(DataError, match="prompt rows need prompt and completion"):
        read([{"prompt": "a"}])


@pytest.mark.parametrize(
    ("found", "labels"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 9, "9", 10.0], ("9", "10")),
        (["b", 1], ("1", "b")),
        ([True, False], ("False", "True")),
        (["01", "1"], ("01", "1")),
    ],
)
def test_labels_are_sorted_as_numbers_where_all_are(
    read: Any, found: list[Any], labels: tuple[str, ...]
) -> None:
    rows = read([{"text": "a", "label": label} for label in found])
    assert rows.labels == labels
    assert {row.label for row in rows.rows} == set(labels)


@pytest.mark.parametrize(
    ("known", "found", "name"),
    [
        (("neg", "pos"), 1, "pos"),
        (("neg", "pos"), "1", "pos"),
        (("neg", "pos"), 1.0, "pos"),
        (("neg", "pos"), " pos", "pos"),
        (("2", "1", "3"), 1, "1"),
        (("2", "1", "3"), 2.0, "2"),
        (("1.0", "2.5"), 2.5, "2.5"),
        (("1.0", "2.5"), 1.0, "1.0"),
    ],
)
def test_a_number_names_a_class_or_a_position_among_words(
    read: Any, known: tuple[str, ...], found: object, name: str
) -> None:
    assert read([{"text": "a", "label": found}], labels=known).rows[0].label == name


@pytest.mark.parametrize(
    ("known", "found"),
    [(("neg", "pos"), 2), (("neg", "pos"), -1), (("1", "2"), 0), (("a", "b"), "c")],
)
def test_an_unknown_label_is_told_with_the_known_ones(
    read: Any, known: tuple[str, ...], found: object
) -> None:
    message = f"line 1: unknown label '{found}'; the labels are {', '.join(known)}"
    with pytest.raises(DataError, match=message):
        read([{"text": "a", "label": found}], labels=known)


def test_labels_of_the_settings_hold_where_none_are_given(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,2\n")
    rows = read_rows(str(path), DataConfig(labels=("3", "2")))
    assert (rows.labels, rows.rows[0].label) == (("3", "2"), "2")


@pytest.mark.parametrize("label", [None, ""])
def test_a_missing_label_is_told(read: Any, label: object) -> None:
    with pytest.raises(DataError, match="line 2: the label is missing"):
        read([{"text": "a", "label": 1}, {"text": "a", "label": label}])


def test_fractions_are_no_classes_but_can_be_predicted(read: Any) -> None:
    rows = [{"text": "a", "label": 2.5}, {"text": "b", "label": "4"}]
    with pytest.raises(DataError, match=r"line 1: label 2.5 is a fraction: set task: regression"):
        read(rows)
    predicted = read(rows, task="regression")
    assert (predicted.kind, predicted.labels) == ("classification", None)
    assert [row.label for row in predicted.rows] == [2.5, 4.0]


@pytest.mark.parametrize("label", ["high", "nan", float("inf"), [1]])
def test_a_regression_refuses_what_is_no_finite_number(read: Any, label: object) -> None:
    with pytest.raises(DataError, match=r"line 1: label is .*, where a (finite )?number is needed"):
        read([{"text": "a", "label": label}], task="regression")


def test_rows_of_one_class_teach_nothing(read: Any) -> None:
    with pytest.raises(DataError, match="every row has the label 'x'"):
        read([{"text": "a", "label": "x"}] * 3)


def test_references_are_what_an_answer_is_compared_with() -> None:
    turns = tuple(Message(**turn) for turn in TURNS)
    assert references_of(PromptRow(prompt="a", completion="b")) == ("b",)
    assert references_of(PromptRow(prompt="a", completion="b", references=("c", "d"))) == ("c", "d")
    assert references_of(PromptRow(prompt="a", completion="")) == ("",)
    assert references_of(PromptRow(prompt="a", completion=None)) == ()
    assert references_of(MessagesRow(messages=turns)) == ("Hello",)
    assert references_of(MessagesRow(messages=turns[:1])) == ()
    assert references_of(TextRow(text="a")) == ()


def test_settings_refuse_unknown_fields_and_doubled_labels() -> None:
    with pytest.raises(ValueError, match="promt"):
        DataConfig(fields={"promt": "x"})
    with pytest.raises(ValueError, match="names a class twice"):
        DataConfig(labels=("a", "b", "a"))


SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets beside the repository")
def test_real_files_are_read_whole() -> None:
    fields = {"prompt": "meaning_representation", "completion": "human_reference"}
    e2e = read_rows(str(SHARED / "e2e_nlg" / "test.jsonl"), DataConfig(fields=fields))
    assert len(e2e) == 630
    assert sum(len(references_of(row)) for row in e2e.rows) == 4693
    pairs = DataConfig(fields={"text": "sentence1", "text_pair": "sentence2"})
    stsb = read_rows(str(SHARED / "stsb" / "test.jsonl"), pairs, task="regression")
    assert len(stsb) == 1379
    mrpc = read_rows(str(SHARED / "mrpc" / "test.jsonl"), pairs)
    assert (len(mrpc), mrpc.labels) == (1725, ("0", "1"))
