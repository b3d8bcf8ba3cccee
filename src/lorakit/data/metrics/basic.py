"""Scores of a model's outputs. Shares are from 0 to 1, correlations from -1 to 1, BLEU to 100."""

import math
from collections.abc import Hashable, Sequence
from importlib.metadata import version
from itertools import zip_longest
from types import ModuleType

import numpy as np

from lorakit.errors import DataError, MissingExtraError


def exact_match(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of outputs, from 0 to 1, that equal one of their references.

    White space at either end does not count; everything else does.

    Raises:
        DataError: there is no output, or not one list of references for each.
    """
    _check(outputs, references)
    hits = [
        output.strip() in {reference.strip() for reference in known}
        for output, known in zip(outputs, references, strict=True)
    ]
    return sum(hits) / len(hits)


def accuracy(predicted: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """The share of predictions, from 0 to 1, that are right.

    Raises:
        DataError: there is no prediction, or not one expectation for each.
    """
    _check(predicted, expected)
    return sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(predicted)


def pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation, from -1 to 1; NaN where one side is constant, as a single value is.

    Raises:
        DataError: there is no prediction, or not one expectation for each.
    """
    _check(predicted, expected)
    x, y = (np.asarray(side, dtype=np.float64) for side in (predicted, expected))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def matthews(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Matthews' correlation of classes, from -1 to 1; 0 where one side has a single class.

    It is that of the two sides as indicators of each class (Gorodkin 2004).

    Raises:
        DataError: there is no prediction, or not one expectation for each.
    """
    _check(predicted, expected)
    classes = np.unique([*predicted, *expected])
    x, y = (np.asarray(side)[:, None] == classes for side in (predicted, expected))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = float((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / spread**0.5) if spread else 0.0


def check_library(metric: str) -> None:
    """Make sure that the library which computes a score is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if metric == "bleu":
        _sacrebleu()


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The corpus BLEU, from 0 to 100, in lower case, as sacrebleu computes it.

    Each output may have another number of references.

    Raises:
        DataError: there is no output, or an output has no reference.
        MissingExtraError: sacrebleu is not installed.
    """
    _check(outputs, references)
    without = sum(not known for known in references)
    if without:
        raise DataError(
            f"BLEU needs references, and {without} of {len(outputs)} outputs have none."
        )
    # sacrebleu wants the first references of all, then the second ones, with gaps as None.
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(_sacrebleu().corpus_bleu(list(outputs), streams, lowercase=True).score)


def bleu_scorer() -> str:
    """The name and version of the library that computes `bleu`."""
    return f"sacrebleu {version('sacrebleu')}, in lower case"


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError:
        raise MissingExtraError("BLEU", "metrics") from None
    return sacrebleu


def _check(outputs: Sequence[object], expected: Sequence[object]) -> None:
    if not outputs or len(outputs) != len(expected):
        raise DataError(
            f"A score needs outputs and as many expectations; found {len(outputs)} outputs and"
            f" {len(expected)} expectations."
        )
