"""Rows of a source, read and checked as a whole before anything is trained on them."""

from dataclasses import replace
from typing import Any

from lorakit.config.rows import RowType
from lorakit.config.train import DataConfig
from lorakit.data.builtin import builtin_task
from lorakit.data.columns import ColumnTable, Values
from lorakit.data.conversations import has_message_lists, messages_row, two_part_row
from lorakit.data.fields import FieldMap, as_text
from lorakit.data.labels import class_order
from lorakit.data.nested import rows_within, with_nested
from lorakit.data.objectives import BY_KIND, OBJECTIVES
from lorakit.data.objectives.objective import Objective
from lorakit.data.problems import Problems
from lorakit.data.row_types import WRITTEN, PromptRow, Rows, TextRow
from lorakit.data.sources import read_raw_rows
from lorakit.data.tasks import PREFIX as TASK_PREFIX
from lorakit.data.tasks import task_of
from lorakit.errors import DataError

BUILTIN_PREFIX = "builtin:"


def read_rows(
    source: str,
    data: DataConfig,
    *,
    limit: int | None = None,
    every: int | None = None,
    split: str = "train",
    labels: tuple[str, ...] | None = None,
    task: str | None = None,
    answered: bool = True,
) -> Rows:
    """The rows of a file, a hub data set, a built-in task or a task of the paper.

    Args:
        source: what `DataConfig.train` may be.
        data: the type of row, the names of the columns, and the classes.
        limit: read only the first so many rows.
        every: of these take only each so many-th.
        split: the split to read where the source has several and names none.
        labels: the classes of the training rows, for validation rows. None: those of `data`, or
            the distinct labels found.
        task: what the rows are for, as the setting of that name. None: what their type is for.
        answered: prompt rows need a completion; False for prompts that are for generation alone.

    Raises:
        DataError: the source is missing, malformed or lacks fields, or its rows are not for the
            task; lists what is wrong.
        MissingExtraError: the library that reads the source is not installed.
    """
    how: Any = {"limit": limit, "split": split, "labels": labels, "task": task}
    rows = _all_rows(source, data, **how, answered=answered)
    return rows if every is None else replace(rows, rows=rows.rows[::every])


def _all_rows(
    source: str,
    data: DataConfig,
    *,
    limit: int | None,
    split: str,
    labels: tuple[str, ...] | None,
    task: str | None,
    answered: bool,
) -> Rows:
    if source.startswith(BUILTIN_PREFIX):
        return _builtin_rows(source, data, limit=limit, split=split, task=task)
    if source.startswith(TASK_PREFIX):
        return _paper_rows(source, limit=limit, split=split, labels=labels, task=task)
    raw = read_raw_rows(source, limit=limit, split=split, delimiter=data.delimiter)
    table = ColumnTable.of(source, with_nested(raw.rows, data.fields), data)
    try:
        kind = table.kind(data, task=task, answered=answered)
    except DataError as error:
        raise DataError(f"{error}{rows_within(raw.rows)}") from None
    _check_task(source, kind, task)
    known = tuple(labels or data.labels or ()) or None
    rows = _typed_rows(table, kind, labels=known, task=task, answered=answered)
    return replace(rows, notes=(*raw.notes, *rows.notes))


def _paper_rows(
    source: str,
    *,
    limit: int | None,
    split: str,
    labels: tuple[str, ...] | None,
    task: str | None,
) -> Rows:
    """The rows of a task of the paper; in training one for each reference."""
    found, named, folder = task_of(source)
    _check_task(source, found.kind, task)
    wanted = named or (split if split in found.splits else "validation")
    rows = found.rows(wanted, folder=folder, limit=limit, training=split == "train")
    if labels is None or rows.labels is None:
        return rows
    if set(labels) != set(rows.labels):
        raise DataError(
            f"{source} has the classes {', '.join(rows.labels)}, and the model"
            f" {', '.join(labels)}: train an adapter on the task first"
        )
    return replace(rows, labels=labels)


def _typed_rows(
    table: ColumnTable,
    kind: RowType,
    *,
    labels: tuple[str, ...] | None,
    task: str | None,
    answered: bool,
) -> Rows:
    """The rows of a table, of one type."""
    source = table.source
    match kind:
        case "messages":
            turns = table.rows(lambda values: messages_row(table.fields, values))
            notes = table.remarks("messages")
            return Rows(kind="messages", rows=turns, source=source, notes=notes)
        case "prompt" if has_message_lists(table.fields, [each.values for each in table.raw]):
            turns = table.rows(lambda values: two_part_row(table.fields, values))
            notes = table.remarks("messages", "prompt", "completion")
            return Rows(kind="messages", rows=turns, source=source, notes=notes)
        case "prompt":
            return _prompt_rows(table, answered=answered)
        case "text":
            texts = table.rows(lambda values: TextRow(text=table.fields.text("text", values)))
            return Rows(kind="text", rows=texts, source=source, notes=table.remarks("text"))
        case _:
            objective = BY_KIND[kind] if task is None else OBJECTIVES[task]
            return _labelled_rows(table, objective, known=labels)


def _check_task(source: str, kind: RowType, task: str | None) -> None:
    """Make sure that rows of a type are for a task.

    Raises:
        DataError: they are for another.
    """
    if task is None:
        return
    if kind in WRITTEN if task == "generation" else kind == OBJECTIVES[task].kind:
        return
    if task == "generation":
        needed = "rows with prompt and completion, messages or text"
        hint = "data.format: text learns the texts alone, without their labels"
    else:
        needed = f"rows with {' and '.join(OBJECTIVES[task].needed)}"
        hint = "data.format and data.fields say which columns these are"
    raise DataError(
        f"{source} has {kind} rows, and the task is {task}, which needs {needed}: {hint}"
    )


def _builtin_rows(
    source: str, data: DataConfig, *, limit: int | None, split: str, task: str | None
) -> Rows:
    if data.format not in ("auto", "prompt"):
        raise DataError(f"{source} has prompt rows, but data.format is {data.format}.")
    _check_task(source, "prompt", task)
    name, _, named_split = source.removeprefix(BUILTIN_PREFIX).partition(":")
    rows = builtin_task(name).rows(named_split or split)
    return Rows(kind="prompt", rows=rows[:limit], source=source)


def _prompt_rows(table: ColumnTable, *, answered: bool) -> Rows:
    rows = table.rows(lambda values: _prompt_row(table.fields, values, answered=answered))
    empty = sum(not (row.completion or "").strip() for row in rows)
    if answered and empty == len(rows):
        raise DataError(f"{table.source}: all completions are empty ({empty} rows).")
    notes = (*table.remarks("prompt"), *(_answer_notes(table, empty=empty) if answered else ()))
    return Rows(kind="prompt", rows=rows, source=table.source, notes=notes)


def _prompt_row(fields: FieldMap, values: Values, *, answered: bool) -> PromptRow:
    references = _references(fields, values)
    if fields.value("completion", values) is not None or (answered and not references):
        completion: str | None = fields.text("completion", values)
    else:
        completion = references[0] if references else None
    prompt = fields.text("prompt", values)
    return PromptRow(prompt=prompt, completion=completion, references=references)


def _references(fields: FieldMap, values: Values) -> tuple[str, ...]:
    value = fields.value("references", values)
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    return tuple(as_text("references", text) for text in texts)


def _answer_notes(table: ColumnTable, *, empty: int) -> tuple[str, ...]:
    notes = (
        [f"empty completions: {empty}; there the model learns to answer nothing"] if empty else []
    )
    if table.fields.absent("completion", table.columns):
        notes.append("the first of the references is taken as the completion")
    elif "references" in table.fields and table.fields.absent("references", table.columns):
        notes.append("no column for references: a completion is its row's only reference")
    return tuple(notes)


def _labelled_rows(
    table: ColumnTable, objective: Objective, *, known: tuple[str, ...] | None
) -> Rows:
    rows = table.rows(lambda values: objective.row(table.fields, values, known))
    problems = Problems(table.source)
    for number, why in objective.unlike(rows):
        problems.add(table.raw[number].where, why)
    problems.raise_if_any()
    labels = known if objective.has_classes else None
    if objective.has_classes and labels is None:
        names = [name for row in rows for name in objective.names(row)]
        labels = class_order(names, source=table.source)
    kind = objective.kind
    return Rows(kind=kind, rows=rows, source=table.source, labels=labels, notes=table.remarks(kind))
