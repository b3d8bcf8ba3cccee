"""BLEU, METEOR and TER of WebNLG and DART, as their official scorers and as the paper's code do.

They are other scores: the official ones take three references, multi-bleu and tercom's TER of the
whole file; the paper's code takes six, multi-bleu-detok, and the mean of pyter's TER of each
segment (its repository's `eval.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from lorakit.data.metrics.meteor.score import Statistics, meteor_of, statistics_of
from lorakit.data.metrics.ter import least_ter, tercom_edits
from lorakit.errors import MissingExtraError

Variant = Literal["official", "paper"]
OFFICIAL_REFERENCES, PAPER_REFERENCES = 3, 6

Texts = list[str]


@dataclass(frozen=True, kw_only=True)
class _Segments:
    """The scored segments of a file, of which scores of the file and its parts are made."""

    bleu: Callable[[Iterable[int]], float]
    """BLEU of segments, by their numbers."""
    meteor: list[Statistics]
    ter: Callable[[Iterable[int]], float]
    """TER of segments, by their numbers."""

    def scores(self, part: Sequence[int]) -> dict[str, float]:
        """The scores of segments, by their numbers."""
        return {
            "bleu": self.bleu(part),
            "meteor": meteor_of(self.meteor[number] for number in part),
            "ter": self.ter(part),
        }


def webnlg_scores(
    outputs: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    variant: Variant,
    seen: Sequence[bool] | None = None,
) -> dict[str, float]:
    """`bleu` (0 to 100), `meteor` and `ter` (shares) of outputs for WebNLG 2017.

    With `seen`, whether the category of each output's triples occurs in training, also those of the
    two parts, as far as there are such: `bleu_seen`, `bleu_unseen` and so on.

    Raises:
        MissingExtraError: a library of the extra `metrics` is not installed.
    """
    if variant == "paper":
        segments = _paper(outputs, references)
    else:
        plain = _unidecode()
        lines = [_cut(plain(plain(text).lower())) for text in outputs]
        segments = _official(lines, [[plain(_cut(text).lower()) for text in k] for k in references])
    scores = segments.scores(range(len(outputs)))
    for name, wanted in (("seen", True), ("unseen", False)):
        part = [number for number, one in enumerate(seen or ()) if one == wanted]
        if part:
            scores |= {f"{key}_{name}": value for key, value in segments.scores(part).items()}
    return scores


def dart_scores(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, variant: Variant
) -> dict[str, float]:
    """`bleu` (0 to 100), `meteor` and `ter` (shares) of outputs for DART.

    Raises:
        MissingExtraError: a library of the extra `metrics` is not installed.
    """
    if variant == "paper":
        segments = _paper(outputs, references)
    else:
        lines = [_cut(text.lower()) for text in outputs]
        segments = _official(lines, [[_cut(text.lower()) for text in k] for k in references])
    return segments.scores(range(len(outputs)))


def _cut(text: str) -> str:
    """The text with spaces around every character that is not a letter, digit or underscore."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())


def _official(lines: Texts, references: list[Texts]) -> _Segments:
    known = [texts[:OFFICIAL_REFERENCES] for texts in references]
    # multi-bleu counts a missing reference as one of no words.
    padded = [[*texts, *[""] * (OFFICIAL_REFERENCES - len(texts))] for texts in known]
    return _Segments(
        bleu=_bleu(lines, padded, tokenize="none"),
        meteor=statistics_of(lines, known),
        ter=_tercom(lines, known),
    )


def _paper(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> _Segments:
    lines = [_cut(text.lower()) for text in outputs]
    known = [[_cut(text.lower()) for text in texts[:PAPER_REFERENCES]] for texts in references]
    padded = [[*texts, *[texts[0]] * (PAPER_REFERENCES - len(texts))] for texts in known]
    words, known_words = _treebank(lines), [_treebank(texts) for texts in padded]
    return _Segments(
        bleu=_bleu(lines, padded, tokenize="13a"),
        meteor=statistics_of(words, known_words),
        ter=_mean_ter(words, known_words),
    )


def _bleu(
    lines: Texts, references: list[Texts], *, tokenize: str
) -> Callable[[Iterable[int]], float]:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise MissingExtraError("BLEU", "metrics") from None
    bleu = BLEU(tokenize=tokenize, smooth_method="none", lowercase=True, force=True)

    def of_part(part: Iterable[int]) -> float:
        chosen = list(part)
        streams = zip_longest(*(references[number] for number in chosen))
        found = bleu.corpus_score([lines[number] for number in chosen], [list(s) for s in streams])
        return float(found.score)

    return of_part


def _tercom(lines: Texts, references: list[Texts]) -> Callable[[Iterable[int]], float]:
    """The edits to the nearest reference over the mean length of the references, both summed."""
    edits = [
        tercom_edits(line.lower().split(), [text.lower().split() for text in known])
        for line, known in zip(lines, references, strict=True)
    ]
    lengths = [sum(len(text.split()) for text in known) / len(known) for known in references]

    def of_part(part: Iterable[int]) -> float:
        chosen = list(part)
        total, length = (sum(side[number] for number in chosen) for side in (edits, lengths))
        return total / length if length else float(total > 0)

    return of_part


def _mean_ter(lines: Texts, references: list[Texts]) -> Callable[[Iterable[int]], float]:
    """The mean over segments of the least edits per word of one reference."""
    scores = [
        least_ter(line.split(), [text.split() for text in dict.fromkeys(known)])
        for line, known in zip(lines, references, strict=True)
    ]

    def of_part(part: Iterable[int]) -> float:
        chosen = [scores[number] for number in part]
        return sum(chosen) / len(chosen)

    return of_part


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
