"""The sources of rows: files and data sets of the hub, read as raw rows of named values."""

import lzma
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from lorakit.data.file_formats import RawRow, Reading
from lorakit.data.files import data_files
from lorakit.data.image_folders import image_rows, is_image_folder
from lorakit.data.problems import Problems
from lorakit.errors import DataError, MissingExtraError

HUB = "hub:"


@dataclass(frozen=True, kw_only=True)
class RawRows:
    """The raw rows of a source, and remarks on how it was read."""

    rows: tuple[RawRow, ...]
    notes: tuple[str, ...] = ()


def read_raw_rows(
    source: str, *, limit: int | None, split: str, delimiter: str | None = None
) -> RawRows:
    """The first raw rows of files or of a hub data set; all where limit is None.

    Args:
        source: what `data_files` reads, a folder of images, or hub:OWNER/NAME[/SUBSET][:SPLIT].
        limit: how many to read; what follows is not checked.
        split: the split of a hub data set whose source names none.
        delimiter: what separates the columns of CSV files. None: found in their first lines.

    Raises:
        DataError: there is no such source, it is empty, or it is malformed.
        MissingExtraError: the library that reads it is not installed.
    """
    reading = Reading(problems=Problems(source), notes=[], delimiter=delimiter)
    try:
        found: Iterable[RawRow]
        if source.startswith(HUB):
            found = _hub(source, split=split)
        elif is_image_folder(source):
            found = image_rows(source)
        else:
            files = data_files(source)
            found = (row for file in files for row in reading.rows(file))
        raw = tuple(islice(found, limit))
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{source} cannot be unpacked: {error}.") from error
    reading.problems.raise_if_any()
    if not raw:
        raise DataError(f"{source} is empty: it has no rows.")
    return RawRows(rows=raw, notes=tuple(reading.notes))


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
