"""Rows are read from the files that people have: packed, several, from a pipe, in each form."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import threading

import pytest

import lorakit as lk
from lorakit.config.train import DataConfig
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
PAIRS = [(row["prompt"], row["completion"]) for row in ROWS]


def pairs(source, **data):
    return [(row.prompt, row.completion) for row in read_rows(str(source), DataConfig(**data)).rows]


def notes(source, **data):
    return read_rows(str(source), DataConfig(**data)).notes


@pytest.fixture
def put(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_by_each_of_their_names(put, name):
    assert pairs(put(name, LINES)) == PAIRS


@pytest.mark.parametrize(
    ("pack", "name"),
    [
        (gzip.compress, "a.jsonl.gz"),
        (gzip.compress, "packed-but-not-named-so.jsonl"),
        (bz2.compress, "a.jsonl.bz2"),
        (lzma.compress, "a.jsonl.xz"),
    ],
)
def test_packed_files_are_unpacked(put, pack, name):
    assert pairs(put(name, pack(LINES.encode()))) == PAIRS


def test_a_packed_file_that_is_cut_off_is_told(put):
    whole = gzip.compress(LINES.encode())
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be unpacked"):
        pairs(put("cut.jsonl.gz", whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b"PK\x03\x04rest of it", "a zip archive"),
        ("a.csv", b"PAR1rest of it", "a Parquet file"),
        ("a.xlsx", b"PK\x03\x04rest of it", "a spreadsheet: .*save it as CSV"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdrest", "packed with zstd"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(put, name, content, what):
    with pytest.raises(DataError, match=what):
        pairs(put(name, content))


def test_several_files_and_patterns(put, tmp_path):
    put("b.csv", "prompt,completion\np2,c2\n")
    put("a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    put("notes.md", "x")
    assert pairs(f"{tmp_path}/a.jsonl,{tmp_path}/b.csv") == PAIRS
    assert pairs(f"{tmp_path}/a.jsonl, {tmp_path}/*.csv") == PAIRS
    assert pairs(f"{tmp_path}/[ab].*") == PAIRS
    with pytest.raises(DataError, match=r"no file matches .*\*\.parquet"):
        pairs(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match=r"notes\.md is of no kind"):
        pairs(f"{tmp_path}/*")


def test_a_comma_or_a_bracket_in_the_name_of_a_file_is_no_list(put):
    assert pairs(put("a,b [1].jsonl", LINES)) == PAIRS


def test_a_mistake_in_one_of_several_files_is_told_with_its_name(put, tmp_path):
    put("a.jsonl", LINES)
    put("b.jsonl", LINES + "oops\n")
    with pytest.raises(DataError, match=r"\n  b\.jsonl line 4: malformed JSON"):
        pairs(f"{tmp_path}/*.jsonl")


def test_home_is_expanded_in_lists_and_patterns(put, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    put("a.jsonl", LINES)
    assert pairs("~/a.jsonl") == pairs("~/*.jsonl") == PAIRS
    assert pairs("~/a.jsonl,~/a.jsonl") == [*PAIRS, *PAIRS]


def stdin(monkeypatch, content):
    stream = io.TextIOWrapper(io.BytesIO(content))
    monkeypatch.setattr(sys, "stdin", stream)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        json.dumps(ROWS, indent=1),
        "prompt,completion\n" + "".join(f"{p},{c}\n" for p, c in PAIRS),
        gzip.compress(LINES.encode(), mtime=0),
    ],
)
def test_standard_input_is_read_as_what_it_is(monkeypatch, content):
    stdin(monkeypatch, content if isinstance(content, bytes) else content.encode())
    assert pairs("-") == PAIRS


def test_parquet_through_standard_input(monkeypatch, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    stdin(monkeypatch, (tmp_path / "a.parquet").read_bytes())
    assert pairs("-") == PAIRS


def test_empty_standard_input_is_told(monkeypatch):
    stdin(monkeypatch, b"")
    with pytest.raises(DataError, match="is empty"):
        pairs("-")
    with pytest.raises(ConfigError, match="can't both be standard input"):
        DataConfig(train="-", validation="-")


def test_a_pipe_is_read_once(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_text(LINES))
    writer.start()
    assert pairs(fifo) == PAIRS
    writer.join()


def test_an_array_in_a_jsonl_file_is_read_and_named(put):
    for number, text in enumerate([json.dumps(ROWS), json.dumps(ROWS, indent=2)]):
        path = put(f"{number}.jsonl", text)
        assert pairs(path) == PAIRS
        assert notes(path) == (f"{number}.jsonl is one JSON array, and not an object a line",)


def test_objects_over_several_lines(put):
    text = "\n\n".join(json.dumps(row, indent=2) for row in ROWS)
    assert pairs(put("a.jsonl", text)) == pairs(put("a.json", text)) == PAIRS
    one = json.dumps(ROWS[0], indent=2)
    assert pairs(put("b.json", one)) == PAIRS[:1]
    with pytest.raises(DataError, match="line 6: malformed JSON"):
        pairs(put("c.json", f"{one}\n{{\n oops"))


def test_an_object_around_the_rows_is_told(put):
    path = put("squad.json", json.dumps({"version": "1", "data": ROWS}, indent=1))
    with pytest.raises(DataError, match="one row, whose 'data' has a list of 3 objects"):
        pairs(path)


@pytest.mark.parametrize(("delimiter", "name"), [(";", "a semicolon"), ("\t", "a tab")])
def test_another_delimiter_is_found_and_told(put, delimiter, name):
    lines = [("prompt", "completion"), ("a, b", "c"), *PAIRS]
    path = put("a.csv", "".join(delimiter.join(cells) + "\n" for cells in lines))
    assert pairs(path) == [("a, b", "c"), *PAIRS]
    assert notes(path) == (f"the columns of a.csv are separated by {name}",)


def test_a_delimiter_is_taken_from_the_name_the_file_or_the_settings(put):
    assert pairs(put("a.tsv", "prompt\tcompletion\na,b;c\td\n")) == [("a,b;c", "d")]
    assert pairs(put("b.csv", "sep=|\r\nprompt|completion\r\na;b|c\r\n")) == [("a;b", "c")]
    path = put("c.csv", "prompt,x;completion\na,b;c\n")
    fields = {"prompt": "prompt,x"}
    assert pairs(path, delimiter="semicolon", fields=fields) == [("a,b", "c")]
    assert DataConfig(delimiter="tab").delimiter == DataConfig(delimiter="\\t").delimiter == "\t"
    with pytest.raises(ConfigError, match="one character"):
        DataConfig(delimiter="||")


def test_a_cell_may_be_longer_than_python_s_limit(put):
    limit = csv.field_size_limit()
    (found,) = pairs(put("a.csv", f"prompt,completion\n{'x' * 200_000},b\n"))
    assert found == ("x" * 200_000, "b")
    assert csv.field_size_limit() == limit


NESTED = {"id": 1, "data": {"question": "q", "answers": {"text": ["a", "b"]}}}


def test_nested_columns_have_dotted_names(put):
    path = put("a.jsonl", json.dumps(NESTED) + "\n")
    fields = {"prompt": "data.question", "completion": "data.answers.text.0"}
    assert pairs(path, fields=fields) == [("q", "a")]
    fields = {"prompt": "Q{id}: {data.question}", "completion": "data.answers.text.1"}
    assert pairs(path, fields=fields) == [("Q1: q", "b")]
    with pytest.raises(DataError, match=r"there is no column 'data\.qestion'"):
        pairs(path, fields={"prompt": "data.qestion", "completion": "id"})


def test_a_column_whose_own_name_has_dots_comes_first(put):
    path = put("a.csv", "data.question,completion\nq,c\n")
    assert pairs(path, fields={"prompt": "data.question"}) == [("q", "c")]


def test_a_run_trains_on_packed_files_of_several_kinds(put, tiny_llama, tmp_path):
    from lorakit.training.prepare import prepare

    put("a.jsonl.gz", gzip.compress(LINES.encode()))
    put("b.tsv", "prompt\tcompletion\nred\tblue\n")
    data = {"train": f"{tmp_path}/a.*,{tmp_path}/b.tsv"}
    config = lk.TrainConfig(model=str(tiny_llama), out=tmp_path / "o", data=data, steps=1)
    prepared = prepare(config.model_copy(update={"warmup_steps": 0}))
    assert len(prepared.training) == 4
