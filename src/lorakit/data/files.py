"""The files that a source names: paths, lists, globs and streams, packed ones unpacked as read."""

from __future__ import annotations

import bz2
import difflib
import glob
import gzip
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from lorakit.data.problems import Problems
from lorakit.errors import DataError

STDIN = "-"
JSON, CSV, TSV, PARQUET = (".jsonl", ".ndjson", ".json"), ".csv", ".tsv", ".parquet"
KINDS = (*JSON, CSV, TSV, PARQUET)
"""The ends of names of files that can be read."""

_UNPACK: dict[bytes, Callable[[Any], BufferedIOBase]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
"""What opens a packed file, by the bytes that it begins with."""
_PACKED = (".gz", ".bz2", ".xz")
_FOREIGN = {
    b"PK\x03\x04": "a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it first",
    b"\xd0\xcf\x11\xe0": "a spreadsheet: save it as CSV",
    b"SQLite format": "a database: write its rows as JSON lines",
    b"ARROW1": "an Arrow file: save it as Parquet",
}
"""What a file is that cannot be read, by the bytes that it begins with."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One file of rows, or a stream that was read to its end."""

    name: str
    kind: str
    """One of KINDS."""
    content: Path | bytes
    prefix: str = ""
    """For messages, where a source has several files: this one's name and a space."""

    @contextmanager
    def open(self) -> Iterator[BufferedIOBase]:
        """The file's bytes, unpacked, to read inside a `with` block."""
        content = self.content
        with ExitStack() as opened:
            raw: BufferedIOBase = opened.enter_context(
                content.open("rb") if isinstance(content, Path) else BytesIO(content)
            )
            start = raw.read(6)
            raw.seek(0)
            unpack = next((way for magic, way in _UNPACK.items() if start.startswith(magic)), None)
            yield opened.enter_context(unpack(raw)) if unpack else raw

    def lines(self, problems: Problems) -> Iterator[str]:
        """The lines, each with its end; one that is not UTF-8 becomes a problem."""
        offset = 0
        with self.open() as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x} at offset {offset + error.start}"
                    where = f"{self.prefix}line {number}"
                    problems.add(where, f"not UTF-8 ({byte}): save the file as UTF-8")
                    # It still counts as a line, so that the numbers of later ones are right.
                    yield line.decode("utf-8", errors="replace")
                offset += len(line)


def data_files(source: str) -> list[DataFile]:
    """The files that a source names.

    Args:
        source: a path, a glob such as data/*.jsonl, several of them with commas between, or - for
            standard input.

    Raises:
        DataError: a file does not exist, or is of no kind that can be read.
    """
    if source.strip() == STDIN:
        return [_stream("standard input", sys.stdin.buffer.read())]
    paths = _paths(source)
    files = [_file(path) for path in paths]
    if len(files) == 1:
        return files
    return [replace(file, prefix=f"{file.name} ") for file in files]


def _paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.exists():
        return [_not_a_folder(path)]
    parts = [part.strip() for part in source.split(",")]
    if len(parts) > 1:
        return [path for part in parts if part for path in _paths(part)]
    if glob.has_magic(source):
        found = sorted(glob.glob(str(path), recursive=True))
        matching = [Path(each) for each in found if not Path(each).is_dir()]
        if not matching:
            raise DataError(f"no file matches {source}.")
        return matching
    raise DataError(_missing(path))


def _not_a_folder(path: Path) -> Path:
    if not path.is_dir():
        return path
    inside = sorted(file.name for file in path.iterdir() if _kind(file.name))
    some = f", or {path}/*{_kind(inside[0])} for several" if inside else ""
    raise DataError(
        f"{path} is a folder; give one of its files{some}. It has {', '.join(inside) or 'no data'}."
    )


def _missing(path: Path) -> str:
    """The message for a file that is not there, with the files of similar name beside it."""
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does the folder {path.parent}."
    beside = [file.name for file in path.parent.iterdir() if file.is_file()]
    near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"{path} does not exist{hint}"


def _file(path: Path) -> DataFile:
    """A file by its path; a pipe is read, because it can be read only once.

    Raises:
        DataError: it is of no kind that can be read.
    """
    if not path.is_file():
        return _stream(str(path), path.read_bytes(), kind=_kind(path.name))
    kind = _kind(path.name)
    with path.open("rb") as file:
        _refuse_foreign(str(path), file.read(16), kind)
    if not kind:
        raise DataError(f"{path} is of no kind that can be read: {', '.join(KINDS)}.")
    return DataFile(name=path.name, kind=kind, content=path)


def _kind(name: str) -> str:
    """The one of KINDS that a name ends with, where packed before the end that says so; or ""."""
    path = Path(name.lower())
    if path.suffix in _PACKED:
        path = path.with_suffix("")
    return path.suffix if path.suffix in KINDS else ""


def _stream(name: str, content: bytes, kind: str = "") -> DataFile:
    """The content of a stream as a file; its kind is inferred from it where no name says it."""
    file = DataFile(name=name, kind=kind or JSON[0], content=content)
    with file.open() as opened:
        start = opened.read(1 << 16)
    _refuse_foreign(name, start, kind or PARQUET)
    if not kind and start.startswith(b"PAR1"):
        return DataFile(name=name, kind=PARQUET, content=content)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not kind and text and not text.startswith((b"{", b"[")):
        return DataFile(name=name, kind=CSV, content=content)
    return file


def _refuse_foreign(name: str, start: bytes, kind: str) -> None:
    """Make sure that a file's first bytes are not those of another kind of file.

    Raises:
        DataError: they are; says which.
    """
    if start.startswith(b"PAR1") and kind != PARQUET:
        raise DataError(f"{name} is a Parquet file: give it a name that ends with .parquet.")
    found = next((what for magic, what in _FOREIGN.items() if start.startswith(magic)), None)
    if found:
        raise DataError(f"{name} is {found}.")
