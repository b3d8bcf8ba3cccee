"""What tasks with labels make of rows: how they are read, encoded, trained on and scored."""

from collections.abc import Mapping
from types import MappingProxyType

from lorakit.config.rows import RowType
from lorakit.data.objectives.classification import Classification
from lorakit.data.objectives.embedding import Embedding
from lorakit.data.objectives.image_classification import ImageClassification
from lorakit.data.objectives.multi_label import MultiLabel
from lorakit.data.objectives.objective import Objective
from lorakit.data.objectives.preference import Preference
from lorakit.data.objectives.question_answering import QuestionAnswering
from lorakit.data.objectives.regression import Regression
from lorakit.data.objectives.token_classification import TokenClassification

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        each.task: each
        for each in (
            Embedding(),
            QuestionAnswering(),
            TokenClassification(),
            Classification(),
            Regression(),
            MultiLabel(),
            Preference(),
            ImageClassification(),
        )
    }
)
"""The objective of each task with labels. A task that is not among them is generation."""

BY_KIND: Mapping[RowType, Objective] = MappingProxyType(
    {each.kind: each for each in reversed(list(OBJECTIVES.values()))}
)
"""The objective that rows of a type have, where no task is asked for."""


def task_of_base(task: str) -> str:
    """The task that a base is loaded for, and that an adapter does which was trained for a task."""
    return (task in OBJECTIVES and OBJECTIVES[task].of_base) or task
