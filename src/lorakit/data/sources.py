"""The sources of rows: files and data sets of the hub, read as raw rows of named values."""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.problems import Problems
from lorakit.errors import DataError, MissingExtraError

HUB = "hub:"


@dataclass(frozen=True, slots=True)
class RawRow:
    """One line of a file or row of a data set: its values by column, not yet interpreted."""

    where: str
    """For messages: "line 12" or "row 12"."""
    values: dict[str, Any]


def read_raw_rows(source: str, *, limit: int | None, split: str) -> list[RawRow]:
    """The first raw rows of a file or of a hub data set; all where limit is None.

    Args:
        source: a .jsonl, .json, .csv or .parquet file, or hub:OWNER/NAME[/SUBSET][:SPLIT].
        limit: how many to read; what follows is not checked.
        split: the split of a hub data set whose source names none.

    Raises:
        DataError: there is no such source, it is empty, or it is malformed.
        MissingExtraError: the library that reads it is not installed.
    """
    problems = Problems(source)
    try:
        if source.startswith(HUB):
            found = _hub(source, split=split)
        else:
            found = _file(_existing(Path(source).expanduser()), problems)
        raw = list(islice(found, limit))
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    problems.raise_if_any()
    if not raw:
        raise DataError(f"{source} is empty: it has no rows.")
    return raw


def _existing(path: Path) -> Path:
    """The path of a file that exists.

    Raises:
        DataError: it does not; names the files of similar name, or those of the folder.
    """
    if path.is_file():
        return path
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _READERS)
        raise DataError(
            f"{path} is a folder; give one of its files. It has {', '.join(inside) or 'no data'}."
        )
    if not path.parent.is_dir():
        raise DataError(f"{path} does not exist, nor does the folder {path.parent}.")
    beside = [file.name for file in path.parent.iterdir() if file.is_file()]
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise DataError(f"{path} does not exist{hint}")


def _file(path: Path, problems: Problems) -> Iterator[RawRow]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is of no kind that can be read: {', '.join(_READERS)}.")
    return reader(path, problems)


def _lines(path: Path, problems: Problems) -> Iterator[str]:
    """The lines of a file, each with its line end; one that is not UTF-8 becomes a problem."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
                problems.add(f"line {number}", f"not UTF-8 ({byte}): save the file as UTF-8")
                # It still counts as a line, so that the numbers of later ones are right.
                yield line.decode("utf-8", errors="replace")
            offset += len(line)


def _json_lines(path: Path, problems: Problems) -> Iterator[RawRow]:
    for number, line in enumerate(_lines(path, problems), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            problems.add(f"line {number}", _malformed(error))
        else:
            yield from _objects([(f"line {number}", value)], problems)


def _json(path: Path, problems: Problems) -> Iterator[RawRow]:
    """The raw rows of a .json file: JSON lines, or one array of objects."""
    with path.open("rb") as file:
        is_array = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from _json_lines(path, problems)
        return
    try:
        values = json.loads("".join(_lines(path, problems)), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        problems.add(f"line {getattr(error, 'lineno', 1)}", _malformed(error))
    else:
        yield from _objects(((f"row {i}", value) for i, value in enumerate(values, 1)), problems)


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


def _csv(path: Path, problems: Problems) -> Iterator[RawRow]:
    """The raw rows of a .csv file, whose first line names the columns."""
    reader = csv.reader(_lines(path, problems), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            problems.add("line 1", f"two columns are called {' and '.join(map(repr, twice))}")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield RawRow(f"line {start}", dict(zip(header, cells, strict=True)))
            elif cells:
                counts = f"{len(cells)} cells, but the header has {len(header)}"
                problems.add(f"line {start}", f"{counts} (quote a cell that has a comma)")
            start = reader.line_num + 1
    except csv.Error as error:
        problems.add(f"line {reader.line_num}", f"malformed CSV: {error}")


def _parquet(path: Path, problems: Problems) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("Reading a Parquet file", "data") from None
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (RawRow(f"row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        problems.add("the file", f"not Parquet, or damaged: {error}")


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _hub(source: str, *, split: str) -> Iterator[RawRow]:
    """The raw rows of a data set of the hub, which is downloaded if it is not in the cache."""
    name, _, named_split = source.removeprefix(HUB).partition(":")
    owner, _, rest = name.partition("/")
    if not owner or not rest:
        raise DataError(f"{source} names no data set: write hub:OWNER/NAME[/SUBSET][:SPLIT].")
    repository, _, subset = rest.partition("/")
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("Reading a data set of the hub", "data") from None
    try:
        found = datasets.load_dataset(
            f"{owner}/{repository}", subset or None, split=named_split or split
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source} cannot be loaded: {reason}. Without a network, download it elsewhere"
            f" (hf download {owner}/{repository} --repo-type dataset --local-dir FOLDER)"
            " and give the path of its .parquet, .jsonl or .csv file."
        ) from error
    return (RawRow(f"row {number}", row) for number, row in enumerate(found, start=1))
