"""Rows of which nobody knows what is right: read as an objective's, to be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorakit.config.train import DataConfig
from lorakit.data.columns import ColumnTable, Values
from lorakit.data.file_formats import RawRow
from lorakit.data.nested import with_nested
from lorakit.data.objectives.objective import Names, Objective
from lorakit.data.row_types import Row, Rows


def rows_to_answer(
    source: str, raw: Sequence[RawRow], data: DataConfig, objective: Objective, labels: Names
) -> Rows:
    """Raw rows as those of an objective; what they say is right, if they do, is not read.

    Args:
        source: where they are from, for messages.
        raw: the rows.
        data: the names of their columns.
        objective: of the task that is to answer them.
        labels: the names of its classes.

    Raises:
        DataError: a column is missing, or rows cannot be used; lists what is wrong.
    """
    right = objective.right
    fields = {name: at for name, at in data.fields.items() if name not in right}
    known = [
        replace(each, values={k: v for k, v in each.values.items() if k not in right})
        for each in with_nested(raw, fields)
    ]
    table = ColumnTable.of(source, known, data.model_copy(update={"fields": fields}))
    table.check([name for name in objective.needed if name not in right])

    def made(values: Values) -> Row:
        stand_in = objective.stand_in(table.fields, values, labels)
        # A usual column, such as ner_tags, may be read as the field.
        by_column = {table.fields.columns(name, values)[0]: stand_in[name] for name in stand_in}
        return objective.row(table.fields, {**values, **by_column}, labels)

    return Rows(kind=objective.kind, rows=table.rows(made), source=source, labels=labels)
