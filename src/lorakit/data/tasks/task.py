"""What a task is: its splits, how its rows are made, and what scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.config.rows import RowType
from lorakit.data.file_formats import RawRow
from lorakit.data.row_types import LabelledRow, PromptRow, Row, Rows, references_of
from lorakit.data.sources import HUB, read_raw_rows
from lorakit.errors import DataError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """One split of a task: where it is, and its size as published."""

    size: int
    """Rows; of tasks with several references for a row, references."""
    file: str
    """Its file's name in a folder, without .jsonl."""
    hub: str
    """Its name on the hub."""


def splits(**sizes: int) -> dict[str, Split]:
    """Splits whose files, and names on the hub, are called as they are."""
    return {name: Split(size, name, name) for name, size in sizes.items()}


@dataclass(frozen=True)
class Task:
    """A task of the paper."""

    name: str
    """As `lorakit.score` has it."""
    hub: str
    """The data set on the hub: OWNER/NAME[/SUBSET]."""
    splits: Mapping[str, Split]
    row: Callable[[Values], Row]
    """The row of a raw row, with all the references that this has."""
    kind: RowType = "prompt"
    labels: tuple[str, ...] | None = None
    """Names of the classes, by their number in the data."""
    best_by: str | None = None
    """The score by which training chooses the best adapter. None: as for any such rows."""
    grouped: bool = False
    """Whether raw rows of one prompt are its references, as on the hub, where each has one."""
    output: Callable[[Any, Row], Any] = lambda answer, _: answer
    """What `lorakit.score` takes as the output, of an answer to a row or its predicted label."""
    reference: Callable[[Row], Any] = lambda row: reference_of(row)
    """What `lorakit.score` takes as the reference of a row."""
    beside: Callable[[Sequence[Row]], Mapping[str, Any]] = lambda _: {}
    """What else `lorakit.score` takes of the rows, by its arguments' names."""

    def rows(self, split: str, *, folder: str | None, limit: int | None, training: bool) -> Rows:
        """The rows of a split.

        Args:
            split: a name of `splits`.
            folder: the folder of its files; None: from the hub.
            limit: only the first so many raw rows.
            training: a row for each reference, as the paper trains, not one with all of them.

        Raises:
            DataError: the folder or a file is missing, or a row is not as the task has it.
            MissingExtraError: the library that reads the hub is not installed.
        """
        source = _source(self, split, folder)
        raw = read_raw_rows(source, limit=limit, split=self.splits[split].hub)
        rows = list(_made(self, source, raw.rows))
        spread = [one for row in rows for one in _spread(row)]
        sizes = () if limit else tuple(_size_notes(self, split, len(spread)))
        held_out = _by_prompt(spread) if self.grouped else rows
        found = tuple(spread if training else held_out)
        return Rows(
            kind=self.kind,
            rows=found,
            source=source,
            labels=self.labels,
            notes=(*raw.notes, *sizes),
        )


def _source(task: Task, split: str, folder: str | None) -> str:
    if folder is None:
        return f"{HUB}{task.hub}:{task.splits[split].hub}"
    path = Path(folder).expanduser()
    file = path / f"{task.splits[split].file}.jsonl"
    if file.is_file():
        return str(file)
    if not path.is_dir():
        raise DataError(f"The folder {path} of the task {task.name} does not exist.")
    there = [name for name, one in task.splits.items() if (path / f"{one.file}.jsonl").is_file()]
    raise DataError(
        f"{path} has no {file.name}, the split {split} of {task.name}; it has"
        f" {', '.join(there) or 'none of its splits'}."
    )


def _made(task: Task, source: str, raw: Iterable[RawRow]) -> Iterator[Row]:
    problems = []
    for one in raw:
        try:
            yield task.row(one.values)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            missing = f"no {error}" if isinstance(error, KeyError) else str(error)
            problems.append(f"{one.where}: {missing}")
    if problems:
        more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise DataError.listing(
            f"{source} is not {task.name} as published", [*problems[:10], *more]
        )


def _size_notes(task: Task, split: str, found: int) -> Iterator[str]:
    published = task.splits[split].size
    if found != published and split == "train":
        yield f"{task.name}, train: {found:,} of {published:,} as published"
    elif found != published:
        yield (
            f"{task.name}, {split}: {found:,}, where {published:,} were published: scores are not"
            " comparable with published ones"
        )


def _spread(row: Row) -> list[Row]:
    """A row for each reference."""
    if not isinstance(row, PromptRow) or not row.references:
        return [row]
    return [PromptRow(prompt=row.prompt, completion=text) for text in row.references]


def _by_prompt(rows: Iterable[Row]) -> list[Row]:
    """One row for each prompt, in the order of their first rows, with all its references."""
    references: dict[str, list[str]] = {}
    for row in rows:
        assert isinstance(row, PromptRow)
        references.setdefault(row.prompt, []).extend(references_of(row))
    return [
        PromptRow(prompt=prompt, completion=known[0], references=tuple(known))
        for prompt, known in references.items()
    ]


def reference_of(row: Row) -> Any:
    """The texts that answers to a row are compared with, or its label or labels."""
    return row.reference if isinstance(row, LabelledRow) else list(references_of(row))


def with_references(prompt: str, references: Iterable[Any]) -> PromptRow:
    """A prompt and its good answers, without empty ones.

    Raises:
        ValueError: there is no answer.
    """
    known = tuple(text for text in map(str, references) if text.strip())
    if not known:
        raise ValueError("no reference that is a text")
    return PromptRow(prompt=prompt, completion=known[0], references=known)
