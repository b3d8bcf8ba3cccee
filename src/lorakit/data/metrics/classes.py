"""Scores of tags, of sets of classes and of ranks, by seqeval, scikit-learn and scipy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lorakit.data.metrics.basic import accuracy
from lorakit.errors import MissingExtraError

_ENTITY = re.compile(r"O|[BIESL]-.+")
"""The tags of entities: outside of all, or the place of a word in one, and its type."""


def check_seqeval() -> None:
    """Make sure that what scores tags is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _seqeval()


def check_sklearn() -> None:
    """Make sure that what scores sets of classes is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _sklearn()


def scores_of_tags(
    predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]
) -> dict[str, float]:
    """The scores of the tags of words, all from 0 to 1.

    Returns:
        `accuracy` of words. Of tags of entities (B-, I-, O) `precision`, `recall` and `f1` of whole
        entities, as CoNLL-2003 counts them (seqeval); of other tags `f1`, the mean over the tags.

    Raises:
        MissingExtraError: seqeval is not installed.
    """
    metrics = _seqeval()
    found, right = ([tag for tags in side for tag in tags] for side in (predicted, expected))
    scores = {"accuracy": accuracy(found, right)}
    if not all(map(_ENTITY.fullmatch, {*found, *right})):
        f1 = _sklearn().f1_score(right, found, average="macro", zero_division=0)
        return scores | {"f1": float(f1)}
    sides = [list(map(list, expected)), list(map(list, predicted))]
    names = ("precision", "recall", "f1")
    return scores | {
        name: float(getattr(metrics, f"{name}_score")(*sides, zero_division=0)) for name in names
    }


def f1_of_sets(predicted: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
    """The scores of sets of classes, each a row of 0 and 1 for each class; all from 0 to 1.

    Returns:
        `f1_micro`, over all decisions; `f1_macro`, the mean over the classes; and `accuracy`, the
        share of rows whose set is right as a whole.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    metrics = _sklearn()
    right = [[int(one) for one in each] for each in expected]
    scores = {
        f"f1_{how}": float(metrics.f1_score(right, predicted, average=how, zero_division=0))
        for how in ("micro", "macro")
    }
    rows = [tuple(each) for each in predicted]
    return scores | {"accuracy": accuracy(rows, [tuple(each) for each in right])}


def check_scipy() -> None:
    """Make sure that what correlates ranks is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _scipy()


def spearman(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's correlation of ranks, from -1 to 1; NaN where one side is constant.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if len(set(predicted)) < 2 or len(set(expected)) < 2:
        return math.nan
    return float(_scipy().spearmanr(predicted, expected).statistic)


def _scipy() -> ModuleType:
    try:
        import scipy.stats
    except ImportError:
        raise MissingExtraError("correlation of ranks", "metrics") from None
    return scipy.stats


def _seqeval() -> ModuleType:
    try:
        import seqeval.metrics
    except ImportError:
        raise MissingExtraError("F1 of tags", "metrics") from None
    return seqeval.metrics


def _sklearn() -> ModuleType:
    try:
        import sklearn.metrics
    except ImportError:
        raise MissingExtraError("F1", "metrics") from None
    return sklearn.metrics
