"""SAMSum (Gliwa et al., 2019): a chat's summary."""

from __future__ import annotations

from lorakit.data.row_types import Row
from lorakit.data.tasks.task import Task, Values, splits, with_references


def _row(values: Values) -> Row:
    dialogue = "\n".join(str(values["dialogue"]).splitlines())
    if not dialogue.strip():
        raise ValueError("the dialogue is empty")
    return with_references(f"{dialogue}\nSummary:", [values["summary"]])


TASK = Task(
    name="samsum",
    hub="knkarthick/samsum",
    splits=splits(train=14_732, validation=818, test=819),
    row=_row,
)
