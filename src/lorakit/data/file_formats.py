"""Files of rows, read as raw rows of named values: JSON in its forms, CSV, and Parquet."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from lorakit.data.files import CSV, JSON, PARQUET, TSV, DataFile
from lorakit.data.problems import Problems
from lorakit.errors import MissingExtraError

DELIMITERS = ",;\t|"
"""What may separate the columns of a CSV file; of two that are as frequent, the first counts."""
LONGEST_CELL = 2**31 - 1
"""Most characters of a cell; the csv module's own limit is 131,072."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One line of a file or row of a data set: its values by column, not yet interpreted."""

    where: str
    """For messages: "line 12" or "row 12"."""
    values: dict[str, Any]


@dataclass
class Reading:
    """The reading of one source: what is wrong with it, and what is remarkable."""

    problems: Problems
    notes: list[str]
    delimiter: str | None = None
    """What separates the columns of CSV files. None: found in each one's first line."""

    def rows(self, file: DataFile) -> Iterator[RawRow]:
        """The raw rows of a file; what is wrong is added to the problems."""
        return _READERS[file.kind](file, self)


def _json(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    """The raw rows of a JSON file: one a line, one array, or objects that take several lines."""
    with file.open() as opened:
        lines = list(islice((line for line in opened if line.strip()), 2))
    text, second = (
        line.decode("utf-8-sig", errors="replace").strip() for line in (*lines, b"", b"")[:2]
    )
    if text.startswith("["):
        return _json_array(file, reading)
    return _json_objects(file, reading) if _goes_on(text, second) else _json_lines(file, reading)


def _goes_on(line: str, second: str) -> bool:
    """Whether a line is the beginning of an object that ends in a later one."""
    if not line.startswith("{"):
        return False
    # Before a row of its own, it is a row that was cut off; a list may go on with an object.
    if second.startswith("{") and second.endswith("}") and not line.endswith("["):
        return False
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line)
    except (ValueError, RecursionError):
        pass
    return False


def _json_lines(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    for number, line in enumerate(file.lines(reading.problems), start=1):
        if not line.strip():
            continue
        where = f"{file.prefix}line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            reading.problems.add(where, _malformed(error))
        else:
            yield from _objects([(where, value)], reading.problems)


def _json_array(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    try:
        values = json.loads("".join(file.lines(reading.problems)), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        where = f"{file.prefix}line {getattr(error, 'lineno', 1)}"
        reading.problems.add(where, _malformed(error))
        return
    if file.kind != ".json":
        reading.notes.append(f"{file.name} is one JSON array, and not an object a line")
    rows = ((f"{file.prefix}row {number}", value) for number, value in enumerate(values, 1))
    yield from _objects(rows, reading.problems)


def _json_objects(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    """The raw rows of objects that take several lines each; reading ends at a malformed one."""
    text, at, line = "".join(file.lines(reading.problems)), 0, 1
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    while (start := at + len(text[at:]) - len(text[at:].lstrip())) < len(text):
        line += text.count("\n", at, start)
        where = f"{file.prefix}line {line}"
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            where = f"{file.prefix}line {getattr(error, 'lineno', line)}"
            reading.problems.add(where, _malformed(error))
            return
        line += text.count("\n", start, at)
        yield from _objects([(where, value)], reading.problems)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values.

    Raises:
        ValueError: a key is there twice, of which Python's reader would drop one.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def _malformed(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"malformed JSON: {error.msg} (column {error.colno})"
    return f"malformed JSON: {error}"


def _objects(values: Iterable[tuple[str, Any]], problems: Problems) -> Iterator[RawRow]:
    """A raw row for each JSON object; any other value becomes a problem."""
    for where, value in values:
        if isinstance(value, dict):
            yield RawRow(where, value)
        else:
            example = 'an object such as {"prompt": "…", "completion": "…"}'
            problems.add(where, f"{example} is expected, found {json.dumps(value)[:40]}")


def _csv(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    """The raw rows of a CSV file, whose first line names the columns."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield from _csv_rows(file, reading)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    problems, prefix = reading.problems, file.prefix
    lines, skipped = file.lines(problems), 0
    first = next(lines, "")
    # Spreadsheets may say the delimiter in a line of its own.
    said = re.fullmatch(r"sep=(.)\r?\n", first)
    if said:
        first, skipped = next(lines, ""), 1
    delimiter = reading.delimiter or (said and said[1]) or _delimiter(first, file, reading)
    reader = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            where = f"{prefix}line {1 + skipped}"
            problems.add(where, f"two columns are called {' and '.join(map(repr, twice))}")
        start = reader.line_num + 1 + skipped
        for cells in reader:
            where = f"{prefix}line {start}"
            if len(cells) == len(header):
                yield RawRow(where, dict(zip(header, cells, strict=True)))
            elif cells:
                found = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
                counts = f"{found}, but the header has {len(header)}"
                problems.add(where, f"{counts} (quote a cell that has {_named(delimiter)})")
            start = reader.line_num + 1 + skipped
    except csv.Error as error:
        problems.add(f"{prefix}line {reader.line_num + skipped}", f"malformed CSV: {error}")


def _delimiter(header: str, file: DataFile, reading: Reading) -> str:
    """The separator of columns: a tab in .tsv, else what is most frequent in the first line."""
    if file.kind == TSV:
        return "\t"
    unquoted = re.sub(r'"[^"]*"', "", header)
    found = max(DELIMITERS, key=unquoted.count)
    if found != "," and found in unquoted:
        reading.notes.append(f"the columns of {file.name} are separated by {_named(found)}")
        return found
    return ","


def _named(delimiter: str) -> str:
    names = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
    return names.get(delimiter, repr(delimiter))


def _parquet(file: DataFile, reading: Reading) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("Reading a Parquet file", "data") from None
    try:
        with file.open() as opened:
            batches = pyarrow.parquet.ParquetFile(opened).iter_batches()
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield RawRow(f"{file.prefix}row {number}", row)
    except pyarrow.ArrowException as error:
        reading.problems.add(f"{file.prefix}the file", f"not Parquet, or damaged: {error}")


_READERS: dict[str, Callable[[DataFile, Reading], Iterator[RawRow]]] = {
    **dict.fromkeys(JSON, _json),
    CSV: _csv,
    TSV: _csv,
    PARQUET: _parquet,
}
