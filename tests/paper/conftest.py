"""A table of tests: two tasks of GLUE with a few rows, and a tiny model."""

import json
import random
import shutil

import pytest

from lorakit.cli.main import main
from lorakit.paper import cell, check

WORDS = ("red", "green", "blue", "big", "small", "cat", "dog", "bird")
SENTENCE = ("sentence",)
PAIR = ("sentence1", "sentence2")
COLUMNS = {"cola": SENTENCE, "sst2": SENTENCE, "stsb": PAIR}


@pytest.fixture
def data(tmp_path):
    """A folder of tasks, each with a training and a validation file of 32 rows."""
    draw = random.Random(0)
    for task, columns in COLUMNS.items():
        for split in ("train", "validation"):
            file = tmp_path / "data" / task / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(_row(draw, columns)) + "\n" for _ in range(32)))
    return tmp_path / "data"


def _row(draw, columns):
    texts = {column: " ".join(draw.choices(WORDS, k=4)) for column in columns}
    cats = sum("cat" in text for text in texts.values())
    return {**texts, "label": cats if len(columns) == 1 else 2.5 * cats, "idx": 0}


def _query(number):
    header = ["red", "blue"]
    sql = {"sel": number % 2, "agg": 0, "conds": {}}
    sql["conds"] = {"column_index": [0], "operator_index": [0], "condition": ["cat"]}
    return {"question": "big cat", "table": {"id": "1", "header": header}, "sql": sql}


@pytest.fixture
def query_cell(tmp_path, data, tiny_llama, cells):
    """A cell of texts, of which a search with beams is scored too: table8.lora, with its data."""
    folder = tmp_path / "data" / "wikisql"
    folder.mkdir()
    for split in ("train", "validation"):
        lines = (json.dumps(_query(number)) + "\n" for number in range(8))
        (folder / f"{split}.jsonl").write_text("".join(lines))
    (cells / "table8").mkdir()
    (cells / "table8" / "table.yaml").write_text(QUERIES % tiny_llama)
    (cells / "table8" / "lora.yaml").write_text(ROW.replace("small: {}", BEAM))
    forget()


QUERIES = """
title: Texts
rows: [lora]
columns:
  wikisql: {title: WikiSQL, task: wikisql, score: logical_form, factor: 100}
seeds: [0]
over: mean
score: {epoch: last}
small:
  model: %s
  seeds: [0]
  over: mean
  train: {steps: 2, batch_size: 4, dtype: float32, learning_rate: 0.01, warmup_steps: 1}
  score: {rows: 6, batch_size: 4, answers: {max_new_tokens: 4}}
  tasks: {wikisql: {}}
"""
BEAM = "small: {score: {also: {beam 2: {num_beams: 2, max_new_tokens: 4}}}}"
TABLE = """
title: Two tasks
rows: [lora]
columns:
  cola: {title: CoLA, task: cola, score: matthews, factor: 100}
  stsb: {title: STS-B, task: stsb, score: pearson, factor: 100}
seeds: [0]
over: median
small:
  model: %s
  seeds: [0, 1]
  train: {steps: 4, batch_size: 4, eval_every: 2, save_every: 2, dtype: float32,
          learning_rate: 0.01, warmup_steps: 1}
  score: {rows: 16, batch_size: 8}
  tasks:
    cola: {}
    stsb: {train: {task: regression}}
"""
ROW = """
method: LoRA
train: {method: lora, lora: {rank: 2}}
published:
  - model: roberta-base
    row: RoB-base LoRA
    printed: 0.3M
    values: {cola: 63.4, stsb: 91.5}
    spread: {cola: 1.2}
    source: a test
small: {}
"""


@pytest.fixture
def cells(tmp_path, tiny_bert, monkeypatch):
    """The folder of a table's cells in the place of the paper's: table9.lora."""
    folder = tmp_path / "cells"
    (folder / "table9").mkdir(parents=True)
    (folder / "table9" / "table.yaml").write_text(TABLE % tiny_bert)
    (folder / "table9" / "lora.yaml").write_text(ROW)
    monkeypatch.setattr(cell, "FOLDER", folder)
    monkeypatch.setattr(check, "uncommitted", list)
    forget()
    yield folder
    monkeypatch.undo()
    forget()


def forget():
    """Have the cells read again."""
    cell.tables.cache_clear()
    cell.cells.cache_clear()


@pytest.fixture
def change_row(cells):
    """A function that replaces a text in the row of the table."""

    def change(old, new):
        file = cells / "table9" / "lora.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
        forget()

    return change


@pytest.fixture
def add_row(cells):
    """A function that adds a row to the table: the first one, with a text replaced."""

    def add(name, old, new):
        folder = cells / "table9"
        first, table = (folder / "lora.yaml").read_text(), folder / "table.yaml"
        (folder / f"{name}.yaml").write_text(first.replace(old, new))
        table.write_text(table.read_text().replace("rows: [", f"rows: [{name}, "))
        forget()

    return add


@pytest.fixture
def paper(data, cells, tmp_path, capsys):
    """A function that runs a verb of `lorakit paper` on these cells: exit code and JSON."""

    def command(verb, *words):
        flags = {"--results": tmp_path / "results"}
        if verb == "run":
            flags |= {"--data": data, "--work": tmp_path / "work"}
        line = [
            word for name, value in flags.items() if name not in words for word in (name, value)
        ]
        code = main(["paper", verb, *map(str, [*words, *line]), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return command


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory):
    """Where `finished` keeps its results."""
    return tmp_path_factory.mktemp("finished") / "results"


@pytest.fixture
def finished(paper, finished_folder, tmp_path):
    """The results of table9.lora with seed 0, which are run once for all tests."""
    if finished_folder.exists():
        shutil.copytree(finished_folder, tmp_path / "results")
    else:
        code, told = paper("run", "table9.lora", "--seeds", "0")
        ran = [(each["task"], each["seed"], each["state"]) for each in told["runs"]]
        assert (code, ran) == (0, [("cola", 0, "done"), ("stsb", 0, "done")])
        assert not list((tmp_path / "work").rglob("*.safetensors"))
        shutil.copytree(tmp_path / "results", finished_folder)
    return tmp_path / "results" / "table9.lora.small"
