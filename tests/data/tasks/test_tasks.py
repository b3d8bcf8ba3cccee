"""The paper's tasks, on files of a few rows and on the real ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from covering import sampled
from lorakit.config.train import DataConfig
from lorakit.data.row_types import ClassificationRow, PromptRow, references_of
from lorakit.data.rows import read_rows
from lorakit.data.tasks import TASKS, task_of, wikisql
from lorakit.errors import DataError

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
FOLDERS = {"e2e": "e2e_nlg", "webnlg": "web_nlg"}


def write(folder: Path, split: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_references_are_rows_in_training_and_one_row_when_held_out(tmp_path: Path) -> None:
    rows = [
        {"meaning_representation": "name[Mill], eatType[pub]", "human_reference": text}
        for text in ("One.", "Two.")
    ]
    write(tmp_path, "train", rows)
    task = TASKS["e2e"]
    training = task.rows("train", folder=str(tmp_path), limit=None, training=True)
    assert [row.completion for row in training.rows if isinstance(row, PromptRow)] == [
        "One.",
        "Two.",
    ]
    (held_out,) = task.rows("train", folder=str(tmp_path), limit=None, training=False).rows
    assert isinstance(held_out, PromptRow)
    assert (held_out.prompt, held_out.references) == ("name : Mill | Type : pub", ("One.", "Two."))


def test_the_forms_of_the_hub_are_read(tmp_path: Path) -> None:
    webnlg = {
        "modified_triple_sets": {"mtriple_set": [["A | b | C", "C | d | E"]]},
        "lex": {"text": ["Good.", "Bad."], "comment": ["good", "toFix"]},
    }
    write(tmp_path, "test", [webnlg])
    (row,) = TASKS["webnlg"].rows("test", folder=str(tmp_path), limit=None, training=False).rows
    assert isinstance(row, PromptRow)
    assert (row.prompt, row.references) == ("A : b : C | C : d : E", ("Good.",))
    write(
        tmp_path,
        "test",
        [{"tripleset": [["A", "IS IN", "B"]], "annotations": {"text": ["A is in B."]}}],
    )
    (row,) = TASKS["dart"].rows("test", folder=str(tmp_path), limit=None, training=False).rows
    assert isinstance(row, PromptRow)
    assert row.prompt == "A : is in : B"


def test_classes_have_names_and_scores_are_numbers(tmp_path: Path) -> None:
    write(tmp_path, "validation", [{"sentence1": "a", "sentence2": "b", "label": 1}])
    rows = TASKS["rte"].rows("validation", folder=str(tmp_path), limit=None, training=True)
    assert rows.labels == ("entailment", "not_entailment")
    assert rows.rows == (ClassificationRow(text="a", text_pair="b", label="not_entailment"),)
    assert any("277 were published" in note for note in rows.notes)
    write(tmp_path, "validation", [{"sentence1": "a", "sentence2": "b", "label": 2.5}])
    rows = TASKS["stsb"].rows("validation", folder=str(tmp_path), limit=None, training=True)
    assert rows.labels is None
    assert rows.rows[0] == ClassificationRow(text="a", text_pair="b", label=2.5)


@pytest.mark.parametrize(
    "query",
    [
        {"sel": 0, "agg": 0, "conds": []},
        {"sel": 1, "agg": 3, "conds": [[0, 0, "it's AND more"], [2, 2, "1,000"]]},
        {"sel": 2, "agg": 5, "conds": [[1, 1, "x = 'y'"]]},
    ],
)
def test_a_query_is_read_back_as_it_was_written(query: dict[str, Any]) -> None:
    header = ["year", "best score (%)", "score"]
    assert wikisql.read(wikisql.written(query, header), header) == query


@pytest.mark.parametrize(
    "text",
    ["", "SELECT FROM table", "SELECT age FROM table", "SELECT year FROM table WHERE year ~ '1'"],
)
def test_what_is_no_query_is_none(text: str) -> None:
    assert wikisql.read(text, ["year"]) is None


@pytest.mark.parametrize(
    ("task", "split", "row", "message"),
    [
        ("e2e", "test", {"meaning_representation": "a pub"}, "human_reference"),
        ("e2e", "test", {"meaning_representation": "a", "references": ["b"]}, "meaning"),
        ("webnlg", "test", {"triples": ["a | b"], "references": ["c"]}, "is no triple"),
        ("dart", "test", {"tripleset": [["a", "b", "c"]], "references": [""]}, "no reference"),
        ("rte", "validation", {"sentence1": "a", "sentence2": "b", "label": 2}, "0 to 1"),
        ("rte", "validation", {"sentence1": "a", "sentence2": "b", "label": -1}, "not public"),
        ("stsb", "test", {"sentence1": "a", "sentence2": "b", "label": 7}, "from 0 to 5"),
        ("cola", "validation", {"label": 0}, "no 'sentence'"),
        ("samsum", "test", {"dialogue": " ", "summary": "a"}, "dialogue is empty"),
    ],
)
def test_rows_that_are_not_the_tasks_are_refused(
    tmp_path: Path, task: str, split: str, row: dict[str, Any], message: str
) -> None:
    write(tmp_path, split, [row])
    with pytest.raises(DataError, match=message):
        TASKS[task].rows(split, folder=str(tmp_path), limit=None, training=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("task:sst", "did you mean 'sst2'"),
        ("task:rte:test", "it has train, validation"),
    ],
)
def test_a_source_names_a_task_and_a_split(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        task_of(source)
    task, split, folder = task_of("task:rte:train@a/b")
    assert (task.name, split, folder) == ("rte", "train", "a/b")


def test_a_task_is_a_source_of_rows(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path, split, [{"sentence": split, "label": 1}])
    source = f"task:cola@{tmp_path}"
    for asked, split in (("train", "train"), ("test", "validation")):
        rows = read_rows(source, DataConfig(), split=asked)
        assert rows.rows == (ClassificationRow(text=split, label="acceptable"),)
    with pytest.raises(DataError, match="generation"):
        read_rows(source, DataConfig(), task="generation")


def test_a_folder_without_the_split_says_which_it_has(tmp_path: Path) -> None:
    write(tmp_path, "train", [{"sentence": "a", "label": 0}])
    with pytest.raises(DataError, match=r"has no validation\.jsonl.*it has train"):
        TASKS["cola"].rows("validation", folder=str(tmp_path), limit=None, training=False)
    with pytest.raises(DataError, match="does not exist"):
        TASKS["cola"].rows("train", folder=str(tmp_path / "no"), limit=None, training=False)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets beside the repository")
@sampled("name", list(TASKS))
def test_the_real_sets_are_read(name: str) -> None:
    folder = SHARED / FOLDERS.get(name, name)
    split = next(
        s for s in ("test", "validation") if (folder / f"{s}.jsonl").exists() or s != "test"
    )
    rows = TASKS[name].rows(split, folder=str(folder), limit=None, training=False)
    expected = {"e2e": 630, "webnlg": 1862, "dart": 5097, "samsum": 819, "mrpc": 1725, "rte": 277}
    assert len(rows) == expected.get(name, len(rows))
    assert all(references_of(row) for row in rows.rows if isinstance(row, PromptRow))
    incomplete = {"dart", "wikisql", "qqp"}
    assert bool(rows.notes) == (name in incomplete)
