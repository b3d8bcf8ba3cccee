"""Rows of one type, and a task for another: refused when they are read, wherever that is."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.rows import read_rows
from lorakit.errors import DataError
from lorakit.training.prepare import prepare

TURNS = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "cat"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt": [{"prompt": "red", "completion": "cat"}],
    "messages": [{"messages": TURNS}],
    "text": [{"text": "red cat"}],
    "classification": [{"text": "red", "label": "1"}, {"text": "big", "label": "2"}],
}
WRITTEN = ("prompt", "messages", "text")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file of each type of row."""
    folder = tmp_path_factory.mktemp("rows")
    for kind, rows in ROWS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {kind: str(folder / f"{kind}.jsonl") for kind in ROWS}


MISMATCHES = [
    *((kind, task) for task in ("classification", "regression") for kind in WRITTEN),
    ("classification", "generation"),
]


@pytest.mark.parametrize(("kind", "task"), MISMATCHES)
def test_rows_for_another_task_are_refused(files: dict[str, str], kind: str, task: str) -> None:
    with pytest.raises(DataError, match=f"has {kind} rows, and the task is {task}, which needs"):
        read_rows(files[kind], DataConfig(), task=task)


def test_built_in_rows_are_for_generation() -> None:
    with pytest.raises(DataError, match="builtin:sql has prompt rows, and the task is regression"):
        read_rows("builtin:sql", DataConfig(), task="regression")


def test_texts_with_labels_can_be_learnt_as_texts(files: dict[str, str]) -> None:
    data = DataConfig(format="text")
    assert read_rows(files["classification"], data, task="generation").kind == "text"


def _config(model: Path, tmp_path: Path, **data: str) -> TrainConfig:
    return TrainConfig(model=str(model), out=tmp_path / "out", data=data)


@pytest.mark.parametrize("kind", WRITTEN)
def test_validation_rows_are_for_the_task_of_the_training_rows(
    files: dict[str, str], tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    labelled, written = files["classification"], files[kind]
    with pytest.raises(DataError, match=f"has {kind} rows, and the task is classification"):
        prepare(_config(tiny_llama, tmp_path, train=labelled, validation=written))
    with pytest.raises(DataError, match="has classification rows, and the task is generation"):
        prepare(_config(tiny_llama, tmp_path, train=written, validation=labelled))


def test_a_model_is_scored_on_rows_for_its_task(files: dict[str, str], tiny_llama: Path) -> None:
    data = DataConfig(validation=files["classification"])
    with pytest.raises(DataError, match="has classification rows, and the task is generation"):
        lk.evaluate(model=str(tiny_llama), data=data)


def test_numbers_are_no_classes(files: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text('{"text": "a", "label": "good"}\n')
    with pytest.raises(DataError, match="label is 'good', where a number is needed"):
        read_rows(str(file), DataConfig(), task="regression")
