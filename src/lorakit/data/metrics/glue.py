"""The scores of the GLUE tasks, by scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lorakit.errors import DataError, MissingExtraError

LABELS: Mapping[str, tuple[str, ...]] = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
}
"""The names of each task's classes, by their number in the data."""

REGRESSION = "stsb"
NAMES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(LABELS, ("accuracy",)),
    "cola": ("accuracy", "matthews"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    REGRESSION: ("pearson", "spearman"),
}
"""The scores of each task."""


def glue_scores(task: str, outputs: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """The scores of a task of GLUE, each from 0 to 1, correlations from -1.

    `f1` is of the second class (equivalent, duplicate). Correlations of constant outputs do not
    exist: they are NaN for `pearson` and `spearman`, and 0 for `matthews`, as scikit-learn has it.

    Args:
        task: a task of `NAMES`.
        outputs: numbers or names of classes; of STS-B scores from 0 to 5.
        references: the right ones.

    Raises:
        DataError: an output or a reference is no class, or no number.
        MissingExtraError: scikit-learn or scipy is not installed.
    """
    read = _score if task == REGRESSION else lambda value: _class(task, value)
    sides = {"output": outputs, "reference": references}
    problems = [
        f"{name} {index + 1}: {value!r}"
        for name, side in sides.items()
        for index, value in enumerate(side)
        if read(value) is None
    ]
    if problems:
        classes = LABELS.get(task)
        expected = f"a class of {task} ({', '.join(classes)})" if classes else "a score"
        raise DataError.listing(f"Not {expected}", problems[:10])
    found, right = ([read(value) for value in side] for side in sides.values())
    return {name: _METRICS[name](right, found) for name in NAMES[task]}


def _class(task: str, value: Any) -> int | None:
    """The number of a class that is named by number or name."""
    names = LABELS[task]
    text = str(value).strip()
    if text in names:
        return names.index(text)
    return int(text) if text.isdecimal() and int(text) < len(names) else None


def _score(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _accuracy(right: Sequence[Any], found: Sequence[Any]) -> float:
    return sum(a == b for a, b in zip(right, found, strict=True)) / len(right)


def _f1(right: Sequence[Any], found: Sequence[Any]) -> float:
    return float(_sklearn().f1_score(right, found, zero_division=0.0))


def _matthews(right: Sequence[Any], found: Sequence[Any]) -> float:
    return float(_sklearn().matthews_corrcoef(right, found))


def _correlation(name: str, right: Sequence[Any], found: Sequence[Any]) -> float:
    if len(set(right)) < 2 or len(set(found)) < 2:
        return math.nan
    try:
        import scipy.stats
    except ImportError:
        raise MissingExtraError("correlations", "metrics") from None
    return float(getattr(scipy.stats, name)(found, right).statistic)


def _sklearn() -> Any:
    try:
        import sklearn.metrics
    except ImportError:
        raise MissingExtraError("F1 and Matthews' correlation", "metrics") from None
    return sklearn.metrics


_METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": partial(_correlation, "pearsonr"),
    "spearman": partial(_correlation, "spearmanr"),
}
