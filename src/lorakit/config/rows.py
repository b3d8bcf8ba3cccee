"""The names of tasks, of types of rows, and of their fields, as settings have them."""

from typing import Literal

TaskName = Literal[
    "generation",
    "classification",
    "regression",
    "multi-label",
    "token-classification",
    "question-answering",
    "embedding",
    "image-classification",
]
RowType = Literal[
    "prompt",
    "messages",
    "text",
    "classification",
    "multi-label",
    "token-classification",
    "question-answering",
    "embedding",
    "preference",
    "image-classification",
]
Format = Literal["auto", RowType]
RowField = Literal[
    "prompt",
    "completion",
    "references",
    "messages",
    "tools",
    "text",
    "text_pair",
    "negative",
    "label",
    "labels",
    "words",
    "tags",
    "question",
    "context",
    "answers",
    "is_impossible",
    "chosen",
    "rejected",
    "image",
]
