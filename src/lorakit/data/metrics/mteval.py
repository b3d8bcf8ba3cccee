"""BLEU and NIST as the E2E challenge's scorer computes them, in both of its variants.

`perl` is mteval-v13a, the scorer's default; `python` is its `-p`, which the paper's code runs. They
differ in lower case (only A to Z, or every letter), in the smoothing of BLEU, in the length penalty
of NIST, in the words of an empty output (none, or one), and in outputs of fewer words than an
n-gram has, which `-p` counts as a negative number of n-grams.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import MissingExtraError

Variant = Literal["python", "perl"]
BLEU_ORDERS, NIST_ORDERS = 4, 5
_ASCII_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_FLOOR, _LEAST_TOTAL = 1e-15, 1e-9

Ngram = tuple[str, ...]
Words = list[str]


@dataclass(frozen=True)
class _Corpus:
    """Tokenised outputs, each with its references."""

    outputs: list[Words]
    references: list[list[Words]]
    variant: Variant

    @property
    def words(self) -> int:
        """The number of words in the outputs."""
        return sum(map(len, self.outputs))

    def totals(self, order: int) -> int:
        """The number of n-grams of one order in the outputs."""
        counts = [len(output) - order + 1 for output in self.outputs]
        return sum(counts) if self.variant == "python" else sum(max(0, count) for count in counts)

    def matches(self, order: int) -> list[Counter[Ngram]]:
        """The outputs' n-grams that a reference has, each as often as one reference has it."""
        return [
            _ngrams(output, order) & _most([_ngrams(words, order) for words in known])
            for output, known in zip(self.outputs, self.references, strict=True)
        ]


def bleu_and_nist(
    outputs: Sequence[str], references: Sequence[Sequence[str]], *, variant: Variant
) -> tuple[float, float]:
    """BLEU (0 to 1) and NIST (from 0) of a whole file.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    cut = _cutter(variant)
    cut_references = [[cut(text) for text in known] for known in references]
    corpus = _Corpus([cut(text) for text in outputs], cut_references, variant)
    return _bleu(corpus), _nist(corpus)


def _cutter(variant: Variant) -> Callable[[str], Words]:
    """The tokeniser of mteval-v13a, with the variant's lower case."""
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError:
        raise MissingExtraError("BLEU and NIST", "metrics") from None
    tokenize = Tokenizer13a()
    if variant == "perl":
        return lambda text: tokenize(text).translate(_ASCII_LOWER).split()
    return lambda text: tokenize(text).lower().split() or [""]


def _bleu(corpus: _Corpus) -> float:
    closest = sum(
        min((abs(len(words) - len(output)), len(words)) for words in known)[1]
        for output, known in zip(corpus.outputs, corpus.references, strict=True)
    )
    if not corpus.words:
        return 0.0
    logarithms = 0.0
    halvings = 0
    for order in range(1, BLEU_ORDERS + 1):
        matches = sum(counter.total() for counter in corpus.matches(order))
        total = corpus.totals(order)
        if corpus.variant == "python":
            precision = max(matches, _FLOOR) / max(total, _LEAST_TOTAL)
        elif not total:
            return 0.0
        else:
            # An order without a match counts as half a match, the next one as a quarter.
            halvings += not matches
            precision = (matches or 0.5**halvings) / total
        logarithms += math.log(precision) / BLEU_ORDERS
    return math.exp(logarithms + min(0.0, 1 - closest / corpus.words))


def _nist(corpus: _Corpus) -> float:
    score = 0.0
    seen = [_all_ngrams(corpus, order) for order in range(1, NIST_ORDERS + 1)]
    reference_words = seen[0].total()
    for order in range(1, NIST_ORDERS + 1):
        information = 0.0
        for matched in corpus.matches(order):
            for ngram, count in matched.items():
                prefix = seen[order - 2][ngram[:-1]] if order > 1 else reference_words
                information += count * math.log2(prefix / seen[order - 1][ngram])
        score += information / (corpus.totals(order) or 1)
    return score * _length_penalty(corpus)


def _all_ngrams(corpus: _Corpus, order: int) -> Counter[Ngram]:
    counts: Counter[Ngram] = Counter()
    for known in corpus.references:
        for words in known:
            counts.update(_ngrams(words, order))
    return counts


def _length_penalty(corpus: _Corpus) -> float:
    """NIST's penalty of outputs that are shorter than the references are on average."""
    if corpus.variant == "perl":
        mean_count = sum(map(len, corpus.references)) / len(corpus.references)
        expected = sum(len(words) for known in corpus.references for words in known) / mean_count
    else:
        expected = sum(sum(map(len, known)) / len(known) for known in corpus.references)
    ratio = corpus.words / expected if expected else 1.0
    if ratio <= 0:
        return 0.0
    beta = math.log(2) / math.log(1.5) ** 2
    return math.exp(-beta * math.log(min(1.0, ratio)) ** 2)


def _ngrams(words: Sequence[str], order: int) -> Counter[Ngram]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def _most(counters: Sequence[Counter[Ngram]]) -> Counter[Ngram]:
    most: Counter[Ngram] = Counter()
    for counter in counters:
        most |= counter
    return most
