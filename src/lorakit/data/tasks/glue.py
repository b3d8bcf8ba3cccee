"""The eight tasks of GLUE (Wang et al., 2019) that the paper trains on."""

from __future__ import annotations

import math

from lorakit.data.metrics.glue import LABELS, REGRESSION
from lorakit.data.row_types import ClassificationRow, Row
from lorakit.data.tasks.task import Split, Task, Values, splits


def _task(name: str, columns: tuple[str, ...], sizes: dict[str, Split]) -> Task:
    labels = LABELS.get(name)

    def row(values: Values) -> Row:
        texts = [str(values[column]) for column in columns]
        label = values["label"]
        if name == REGRESSION:
            named: str | float = _score(label)
        else:
            named = _class(labels or (), label)
        pair = texts[1] if len(texts) > 1 else None
        return ClassificationRow(text=texts[0], text_pair=pair, label=named)

    hub = f"nyu-mll/glue/{name}"
    best_by = "matthews" if name == "cola" else None
    return Task(name, hub, sizes, row, kind="classification", labels=labels, best_by=best_by)


def _class(labels: tuple[str, ...], label: object) -> str:
    if label == -1:
        raise ValueError("label -1: the labels of this split are not public")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(labels):
        raise ValueError(f"label {label!r} is none of 0 to {len(labels) - 1} ({', '.join(labels)})")
    return labels[label]


def _score(label: object) -> float:
    number = float(label) if isinstance(label, (int, float)) else math.nan
    if not 0 <= number <= 5:
        raise ValueError(f"label {label!r} is no score from 0 to 5")
    return number


_SENTENCES = ("sentence1", "sentence2")
_MNLI = {
    "train": Split(392_702, "train", "train"),
    "validation": Split(9_815, "validation_matched", "validation_matched"),
    "validation_mismatched": Split(9_832, "validation_mismatched", "validation_mismatched"),
}
TASKS = (
    _task("cola", ("sentence",), splits(train=8_551, validation=1_043)),
    _task("sst2", ("sentence",), splits(train=67_349, validation=872)),
    _task("mrpc", _SENTENCES, splits(train=3_668, validation=408, test=1_725)),
    _task("stsb", _SENTENCES, splits(train=5_749, validation=1_500, test=1_379)),
    _task("qqp", ("question1", "question2"), splits(train=363_846, validation=40_430)),
    _task("mnli", ("premise", "hypothesis"), _MNLI),
    _task("qnli", ("question", "sentence"), splits(train=104_743, validation=5_463)),
    _task("rte", _SENTENCES, splits(train=2_490, validation=277)),
)
