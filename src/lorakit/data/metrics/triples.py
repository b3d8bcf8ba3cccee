"""BLEU, METEOR and TER of WebNLG and DART, as their official scorers and as the paper's code do.

They are other scores: the official ones take three references, multi-bleu and tercom's TER of the
whole file; the paper's code takes six, multi-bleu-detok, and the mean of pyter's TER of each
segment (its repository's `eval.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Literal

from lorakit.data.metrics.meteor.score import meteor
from lorakit.errors import MissingExtraError

Variant = Literal["official", "paper"]
OFFICIAL_REFERENCES, PAPER_REFERENCES = 3, 6

Texts = list[str]


def webnlg_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, variant: Variant
) -> dict[str, float]:
    """`bleu` (0 to 100), `meteor` and `ter` (shares) of outputs for WebNLG 2017.

    Raises:
        MissingExtraError: a library of the extra `metrics` is not installed.
    """
    if variant == "paper":
        return _paper(outputs, references)
    plain = _unidecode()
    lines = [_cut(plain(plain(text).lower())) for text in outputs]
    return _official(lines, [[plain(_cut(text).lower()) for text in k] for k in references])


def dart_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, variant: Variant
) -> dict[str, float]:
    """`bleu` (0 to 100), `meteor` and `ter` (shares) of outputs for DART.

    Raises:
        MissingExtraError: a library of the extra `metrics` is not installed.
    """
    if variant == "paper":
        return _paper(outputs, references)
    lines = [_cut(text.lower()) for text in outputs]
    return _official(lines, [[_cut(text.lower()) for text in known] for known in references])


def _cut(text: str) -> str:
    """The text with spaces around every character that is not a letter, digit or underscore."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())


def _official(lines: Texts, references: list[Texts]) -> dict[str, float]:
    known = [texts[:OFFICIAL_REFERENCES] for texts in references]
    # multi-bleu counts a missing reference as one of no words.
    padded = [[*texts, *[""] * (OFFICIAL_REFERENCES - len(texts))] for texts in known]
    return {
        "bleu": _bleu(lines, padded, tokenize="none"),
        "meteor": meteor(lines, known)[0],
        "ter": _tercom(lines, known),
    }


def _paper(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    lines = [_cut(text.lower()) for text in outputs]
    known = [[_cut(text.lower()) for text in texts[:PAPER_REFERENCES]] for texts in references]
    padded = [[*texts, *[texts[0]] * (PAPER_REFERENCES - len(texts))] for texts in known]
    words, known_words = _treebank(lines), [_treebank(texts) for texts in padded]
    return {
        "bleu": _bleu(lines, padded, tokenize="13a"),
        "meteor": meteor(words, known_words)[0],
        "ter": _pyter(words, known_words),
    }


def _bleu(lines: Texts, references: list[Texts], *, tokenize: str) -> float:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("BLEU", "metrics") from None
    bleu = BLEU(tokenize=tokenize, smooth_method="none", lowercase=True, force=True)
    return float(bleu.corpus_score(lines, [list(s) for s in zip_longest(*references)]).score)


def _tercom(lines: Texts, references: list[Texts]) -> float:
    """The edits to the nearest reference over the mean length of the references, both summed."""
    try:
        from sacrebleu.metrics.ter import TER
    except ImportError:
        raise MissingExtraError("TER", "metrics") from None
    streams = [list(stream) for stream in zip_longest(*references)]
    return float(TER().corpus_score(lines, streams).score) / 100


def _pyter(lines: Texts, references: list[Texts]) -> float:
    """The mean over segments of the least edits per word of one reference."""
    try:
        import pyter
    except ImportError:
        raise MissingExtraError("the paper's TER", "metrics") from None
    scores = [
        min(pyter.ter(line.split(), text.split()) for text in dict.fromkeys(known))
        for line, known in zip(lines, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def _treebank(lines: Texts) -> Texts:
    try:
        from nltk.tokenize import word_tokenize
    except ImportError:
        raise MissingExtraError("the paper's METEOR", "metrics") from None
    # The text is cut already, so that the sentences' ends need no model of nltk's.
    return [" ".join(word_tokenize(line, preserve_line=True)) for line in lines]


def _unidecode() -> Callable[[str], str]:
    try:
        from unidecode import unidecode
    except ImportError:
        raise MissingExtraError("WebNLG's scorer", "metrics") from None
    return unidecode
