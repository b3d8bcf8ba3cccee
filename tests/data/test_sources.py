import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.file_formats import RawRow
from lorakit.data.sources import read_raw_rows
from lorakit.errors import DataError, MissingExtraError


def records(path: Path, *, limit: int | None = None) -> list[RawRow]:
    return list(read_raw_rows(str(path), limit=limit, split="train").rows)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_json_lines_keep_their_line_numbers_past_blank_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"x": 1}\n\n  \n{"x": "é"}')
    assert records(path) == [RawRow("line 1", {"x": 1}), RawRow("line 4", {"x": "é"})]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"x": 1}\n')
    assert records(path) == [RawRow("line 1", {"x": 1})]
    path = written(tmp_path, "a.csv", b"\xef\xbb\xbfx\n1\n")
    assert records(path) == [RawRow("line 2", {"x": "1"})]


def test_a_json_file_may_be_lines_or_one_array(tmp_path: Path) -> None:
    lines = written(tmp_path, "lines.json", '{"x": 1}\n{"x": 2}\n')
    array = written(tmp_path, "array.json", '\n [{"x": 1},\n {"x": 2}]')
    assert [record.values for record in records(lines)] == [{"x": 1}, {"x": 2}]
    assert records(array) == [RawRow("row 1", {"x": 1}), RawRow("row 2", {"x": 2})]


def test_csv_cells_may_hold_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'a, b\r\n"1, ""2""\nlast",3\r\n\r\n4,\r\n')
    assert records(path) == [
        RawRow("line 2", {"a": '1, "2"\nlast', "b": "3"}),
        RawRow("line 5", {"a": "4", "b": ""}),
    ]


def test_parquet_gives_what_was_written(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"x": "a", "messages": [{"role": "user", "content": "b"}]},
        {"x": None, "messages": []},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert records(path) == [RawRow("row 1", rows[0]), RawRow("row 2", rows[1])]


def test_nothing_after_the_limit_is_looked_at(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"x": 1}\n{"x": 2}\nthis is no JSON\n')
    assert len(records(path, limit=2)) == 2
    with pytest.raises(DataError, match="line 3"):
        records(path, limit=3)


def test_a_missing_file_gets_the_nearest_names_of_its_folder(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "notes.md"):
        written(tmp_path, name, "x")
    with pytest.raises(DataError, match=r"trian.jsonl does not exist; did you mean train.jsonl"):
        records(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"nor does the folder .*nowhere"):
        records(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_is_refused_with_the_data_files_in_it(tmp_path: Path) -> None:
    written(tmp_path, "b.csv", "x")
    written(tmp_path, "a.jsonl", "x")
    written(tmp_path, "notes.md", "x")
    with pytest.raises(DataError, match=r"is a folder.* It has a.jsonl, b.csv\.$"):
        records(tmp_path)


def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.tsv"):
        records(written(tmp_path, "a.txt", "x\ty\n"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", ""), ("a.csv", "x,y\n\n")],
)
def test_a_file_without_rows_is_empty(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match=r"is empty: it has no rows"):
        records(written(tmp_path, name, content))


def test_bytes_that_are_not_utf8_are_told_by_line_and_offset(tmp_path: Path) -> None:
    content = b'{"x": "a"}\n{"x": "caf\xe9"}\n{"x": "b"}\n'
    path = written(tmp_path, "a.jsonl", content)
    offset = content.index(b"\xe9")
    with pytest.raises(DataError, match=rf"line 2: not UTF-8 \(byte 0xe9 at offset {offset}\)"):
        records(path)


def test_lines_after_one_that_is_not_utf8_keep_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: not UTF-8(.|\n)*line 2: malformed JSON"):
        records(written(tmp_path, "a.jsonl", b'{"x": "caf\xe9"}\n{"x": }\n'))
    with pytest.raises(DataError, match=r"line 2: not UTF-8(.|\n)*line 3: 2 cells"):
        records(written(tmp_path, "a.csv", b"x\ncaf\xe9\n1,2\n"))


def test_all_malformed_lines_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"x": 1}\n{"x": }\n[1, 2]\n{"x": 2}\n"text"\n')
    with pytest.raises(DataError) as error:
        records(path)
    headline, *problems = str(error.value).splitlines()
    assert headline == f"{path} cannot be used (3 problems):"
    assert problems[0] == "  line 2: malformed JSON: Expecting value (column 7)"
    assert re.search(r"line 3: an object such as .* is expected, found \[1, 2\]", problems[1])
    assert re.search(r"line 5: .* found \"text\"", problems[2])


def test_a_first_line_that_was_cut_off_is_told_beside_others(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"x": 0\n{"x": 1}\n{"x": }\n')
    with pytest.raises(DataError) as error:
        records(path)
    _, *problems = str(error.value).splitlines()
    assert problems[0].startswith("  line 1: malformed JSON: Expecting ',' delimiter")
    assert problems[1].startswith("  line 3: malformed JSON: Expecting value")


def test_an_object_of_several_lines_may_go_on_with_one_within_it(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"x": [\n{"y": 1}\n]}\n{\n"x": 2\n}\n')
    assert [row.values for row in records(path)] == [{"x": [{"y": 1}]}, {"x": 2}]


def test_of_many_problems_ten_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        records(written(tmp_path, "a.jsonl", "no\n" * 32))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("(32 problems):")
    assert lines[-2].startswith("  line 10:")
    assert lines[-1] == "  and 22 more"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"x": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_malformed(tmp_path: Path, text: str) -> None:
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(DataError, match="line 1: malformed JSON"):
            records(written(tmp_path, name, text))


def test_a_malformed_array_is_told_by_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: malformed JSON: Expecting value \(column 2\)"):
        records(written(tmp_path, "a.json", '[{"x": 1},\n oops]'))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells, but the header has 2"),
        ("a,b\n1,2\n1\n", "line 3: 1 cell, but the header has 2"),
        ("a,b,a\n1,2,3\n", "line 1: two columns are called 'a'"),
        ('a,b\n1,2\n"1,2\n', "line 3: malformed CSV: unexpected end of data"),
    ],
)
def test_csv_that_cannot_be_understood_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        records(written(tmp_path, "a.csv", content))


def test_a_damaged_parquet_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not Parquet, or damaged"):
        records(written(tmp_path, "a.parquet", "PAR1 but not really"))


def test_a_missing_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    for source in (str(written(tmp_path, "a.parquet", "x")), "hub:owner/name"):
        with pytest.raises(MissingExtraError, match=r"pip install 'lorakit\[data\]'"):
            read_raw_rows(source, limit=None, split="train")


class FakeHub:
    """A stand-in for the datasets library."""

    def __init__(self, result: list[dict[str, int]] | Exception) -> None:
        self.result = result
        self.asked: list[tuple[str, str | None, str]] = []

    def load_dataset(self, path: str, name: str | None, *, split: str) -> list[dict[str, int]]:
        self.asked.append((path, name, split))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import datasets

    fake = FakeHub([{"x": 1}, {"x": 2}])
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:owner/name", ("owner/name", None, "validation")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
        ("hub:owner/name/part:test", ("owner/name", "part", "test")),
    ],
)
def test_a_hub_source_names_owner_name_subset_and_split(
    hub: FakeHub, source: str, asked: tuple[str, str | None, str]
) -> None:
    found = read_raw_rows(source, limit=1, split="validation")
    assert found.rows == (RawRow("row 1", {"x": 1}),)
    assert hub.asked == [asked]


@pytest.mark.parametrize("problem", [ConnectionError("Couldn't reach it\nbecause"), ValueError()])
def test_an_unreachable_hub_says_how_to_get_the_data(hub: FakeHub, problem: Exception) -> None:
    hub.result = problem
    with pytest.raises(DataError, match=r"hf download owner/name --repo-type dataset"):
        read_raw_rows("hub:owner/name", limit=None, split="train")


def test_a_hub_source_without_owner_is_refused() -> None:
    with pytest.raises(DataError, match="write hub:OWNER/NAME"):
        read_raw_rows("hub:name:train", limit=None, split="train")


def test_a_file_that_cannot_be_opened_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, "a.jsonl", json.dumps({"x": 1}))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot be read: Permission denied"):
        records(path)
