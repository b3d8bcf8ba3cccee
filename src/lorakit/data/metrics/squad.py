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

    A question without a good answer has the empty text as its one, as SQuAD 2's own script has it.

    Returns:
        `exact_match` and `f1` of words (Rajpurkar et al. 2016), without articles, case and
        punctuation; where some questions have no answer also `f1_answerable` of the others, and
        `f1_unanswerable` of these, the share that was not answered.

    Raises:
        MissingExtraError: torchmetrics is not installed.
    """
    pairs = [(text, list(texts) or [""]) for text, texts in zip(answers, references, strict=True)]
    scores = _means(pairs)
    groups = {
        "f1_answerable": [pair for pair in pairs if pair[1] != [""]],
        "f1_unanswerable": [pair for pair in pairs if pair[1] == [""]],
    }
    if not groups["f1_unanswerable"]:
        return scores
    return scores | {name: _means(own)["f1"] for name, own in groups.items() if own}


def _means(pairs: Sequence[tuple[str, list[str]]]) -> dict[str, float]:
    """torchmetrics' scores of answers, each with its good ones."""
    found = [{"id": str(n), "prediction_text": text} for n, (text, _) in enumerate(pairs)]
    right = [
        {"id": str(n), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
        for n, (_, texts) in enumerate(pairs)
    ]
    scores = _squad()(found, right)
    return {name: float(scores[name]) / 100 for name in ("exact_match", "f1")}


def _squad() -> Any:
    try:
        from torchmetrics.functional.text import squad as compute
    except ImportError:
        raise MissingExtraError("F1 of answers", "metrics") from None
    return compute
