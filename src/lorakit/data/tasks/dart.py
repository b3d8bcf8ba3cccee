"""DART 1.1.1 (Nan et al., 2021): triples of several sources to text.

Triples are written as in the data of the paper's code: as WebNLG's, the relation in lower case.
"""

from __future__ import annotations

from lorakit.data.row_types import Row
from lorakit.data.tasks.task import Task, Values, splits, with_references
from lorakit.data.tasks.webnlg import linearized


def _row(values: Values) -> Row:
    triples = [[s, str(relation).lower(), o] for s, relation, o in values["tripleset"]]
    annotations = values.get("annotations")
    references = annotations["text"] if annotations else values["references"]
    return with_references(linearized(triples), references)


TASK = Task(
    name="dart",
    hub="Yale-LILY/dart",
    splits=splits(train=62_659, validation=6_980, test=12_552),
    row=_row,
)
