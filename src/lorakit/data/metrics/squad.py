"""Exact match and F1 of answers that are parts of a text, as torchmetrics computes SQuAD's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.errors import MissingExtraError


def check_torchmetrics() -> None:
    """Make sure that what scores answers is installed.

    Raises:
        MissingExtraError: it is not.
    """
    _squad()


def squad(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of answers, each with its good ones, from 0 to 1.

    Returns:
        `exact_match` and `f1` of words (Rajpurkar et al. 2016), without articles, case and
        punctuation.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    found = [{"id": str(n), "prediction_text": text} for n, text in enumerate(answers)]
    right = [
        {"id": str(n), "answers": {"text": list(texts), "answer_start": [0] * len(texts)}}
        for n, texts in enumerate(references)
    ]
    scores = _squad()(found, right)
    return {name: float(scores[name]) / 100 for name in ("exact_match", "f1")}


def _squad() -> Any:
    try:
        from torchmetrics.functional.text import squad as compute
    except ImportError:
        raise MissingExtraError("F1 of answers", "metrics") from None
    return compute
