"""METEOR 1.5 of a file of outputs, and of one segment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from lorakit.data.metrics.meteor.align import EXACT, Match, align, chunks_of
from lorakit.data.metrics.meteor.normalize import normalized_words
from lorakit.data.metrics.meteor.tables import Phrase, Tables, tables

# The parameters for English, task "rank" (Denkowski and Lavie, 2014, table 2).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
STEM, SYNONYM, PARAPHRASE = 1, 2, 3
_ROUNDING = 1e-12
"""How far the bound of a score may be off."""


@dataclass(frozen=True)
class _Side:
    """Counts of one side, output or reference; all but the lengths by module."""

    length: int = 0
    function_words: int = 0
    content_matches: tuple[int, ...] = (0, 0, 0, 0)
    function_matches: tuple[int, ...] = (0, 0, 0, 0)

    def __add__(self, other: _Side) -> _Side:
        return _Side(
            self.length + other.length,
            self.function_words + other.function_words,
            tuple(map(sum, zip(self.content_matches, other.content_matches, strict=True))),
            tuple(map(sum, zip(self.function_matches, other.function_matches, strict=True))),
        )

    @property
    def matches(self) -> int:
        """Words that match."""
        return sum(self.content_matches) + sum(self.function_matches)

    @property
    def share(self) -> float:
        """The weighted share of words that match: precision or recall."""
        content, function = (
            sum(count * weight for count, weight in zip(counts, MODULE_WEIGHTS, strict=True))
            for counts in (self.content_matches, self.function_matches)
        )
        length = DELTA * (self.length - self.function_words) + (1 - DELTA) * self.function_words
        return (DELTA * content + (1 - DELTA) * function) / length if length else 0.0


@dataclass(frozen=True)
class Statistics:
    """The counts that METEOR sums over segments."""

    output: _Side = field(default_factory=_Side)
    reference: _Side = field(default_factory=_Side)
    chunks: int = 0

    def __add__(self, other: Statistics) -> Statistics:
        # The chunk of a segment that is all right is no fragment.
        chunks = 0 if other.perfect else other.chunks
        return Statistics(
            self.output + other.output, self.reference + other.reference, self.chunks + chunks
        )

    @property
    def perfect(self) -> bool:
        """Whether all words match in one chunk."""
        sides = (self.output, self.reference)
        return self.chunks == 1 and all(side.matches == side.length for side in sides)

    @property
    def score(self) -> float:
        """The score, from 0 to 1."""
        precision, recall = self.output.share, self.reference.share
        if not precision or not recall:
            return 0.0
        mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        matches = (self.output.matches + self.reference.matches) / 2
        fragmentation = 0.0 if self.perfect else self.chunks / matches
        return max(0.0, mean * (1 - GAMMA * fragmentation**BETA))


def meteor(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """METEOR of all outputs, and of each, from 0 to 1 (`-l en -norm`).

    The corpus's score is of summed counts, not the mean of the segments'.

    Args:
        outputs: one text each, on one line.
        references: of each output, one or more.

    Raises:
        MissingExtraError: METEOR's word lists are not installed.
    """
    segments = statistics_of(outputs, references)
    return meteor_of(segments), [segment.score for segment in segments]


def meteor_of(segments: Iterable[Statistics]) -> float:
    """METEOR of segments together, from 0 to 1."""
    return sum(segments, start=Statistics()).score


def statistics_of(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> list[Statistics]:
    """The counts of each output beside its best reference; arguments and errors as for `meteor`."""
    lists = tables()
    normalized = cache(lambda line: normalized_words(line, lists.prefixes))
    vocabulary = {
        word
        for line in [*outputs, *(line for known in references for line in known)]
        for word in normalized(line)
    }
    matcher = _Matcher(lists, lists.paraphrases(vocabulary))
    segments = []
    for output, known in zip(outputs, references, strict=True):
        found = matcher.sentence(normalized(output))
        others = [matcher.sentence(normalized(line)) for line in known]
        segments.append(_best(found, others))
    return segments


def _best(output: _Sentence, references: Sequence[_Sentence]) -> Statistics:
    """The counts beside the reference with the best score, of equal ones the first.

    The alignment takes most of the time, so references are not aligned that could not be better if
    every word that has a match had it, all in one chunk.
    """
    matches = [_matches(output, reference) for reference in references]
    pairs = zip(references, matches, strict=True)
    bounds = [_counts(output, *pair, chunks=1).score for pair in pairs]
    best, at, score = Statistics(), len(bounds), -1.0
    for number in sorted(range(len(bounds)), key=lambda each: -bounds[each]):
        if bounds[number] < score - _ROUNDING:
            break
        alignment = align(matches[number])
        chunks = chunks_of(alignment)
        found = _counts(output, references[number], [alignment], chunks=chunks)
        if found.score > score or (found.score == score and number < at):
            best, at, score = found, number, found.score
    return best


def _counts(
    output: _Sentence, reference: _Sentence, matches: Sequence[Sequence[Match]], *, chunks: int
) -> Statistics:
    """The counts of matches; a word that has several counts by the best of them."""
    all_of_them = [match for here in matches for match in here]
    return Statistics(
        output.side([(m.module, m.output_start, m.output_length) for m in all_of_them]),
        reference.side([(m.module, m.start, m.length) for m in all_of_them]),
        chunks,
    )


class _Matcher:
    """Finds the words of two sentences that match."""

    def __init__(self, lists: Tables, paraphrases: Mapping[Phrase, list[Phrase]]) -> None:
        from nltk.stem.snowball import SnowballStemmer

        self._lists = lists
        self._paraphrases = paraphrases
        self._lengths: dict[str, set[int]] = {}
        for phrase in paraphrases:
            self._lengths.setdefault(phrase[0], set()).add(len(phrase))
        self._stem = cache(SnowballStemmer("english").stem)

    def sentence(self, words: list[str]) -> _Sentence:
        """A sentence with the stems, synonyms and paraphrases that matching compares."""
        keys: dict[int, Sequence[Collection[str]]] = {
            STEM: [(self._stem(word),) for word in words],
            SYNONYM: [self._lists.synsets(word) for word in words],
        }
        return _Sentence(
            words=words,
            is_function=[word in self._lists.function_words for word in words],
            keys=keys,
            rewritings=list(self._rewritings(words)),
        )

    def _rewritings(self, words: list[str]) -> Iterator[tuple[int, int, Phrase]]:
        """The paraphrases of a sentence's phrases, each with the phrase's start and length."""
        for start, word in enumerate(words):
            for length in sorted(self._lengths.get(word, ())):
                if length > len(words) - start:
                    break
                for paraphrase in self._paraphrases.get(tuple(words[start : start + length]), ()):
                    yield start, length, paraphrase


@dataclass(frozen=True)
class _Sentence:
    """A sentence, and what of it may match."""

    words: list[str]
    is_function: list[bool]
    keys: Mapping[int, Sequence[Collection[str]]]
    """By module what each word has in common with words that it matches: stems, synonym sets."""
    rewritings: list[tuple[int, int, Phrase]]
    """The paraphrases of phrases, each with the phrase's start and length."""

    @cached_property
    def places(self) -> Mapping[str, list[int]]:
        """The positions of each word."""
        return _places((word,) for word in self.words)

    @cached_property
    def places_of_keys(self) -> Mapping[int, Mapping[str, list[int]]]:
        """By module where each key is."""
        return {module: _places(of_words) for module, of_words in self.keys.items()}

    def side(self, matches: Sequence[tuple[int, int, int]]) -> _Side:
        """The counts of matches, each a module, a start and a length; of each word the best one."""
        best: dict[int, int] = {}
        for module, start, length in matches:
            for word in range(start, start + length):
                known = best.get(word)
                if known is None or MODULE_WEIGHTS[module] > MODULE_WEIGHTS[known]:
                    best[word] = module
        counts = {True: [0, 0, 0, 0], False: [0, 0, 0, 0]}
        for word, module in best.items():
            counts[self.is_function[word]][module] += 1
        content, function = tuple(counts[False]), tuple(counts[True])
        return _Side(len(self.words), sum(self.is_function), content, function)

    def rewritten_in(self, other: _Sentence) -> Iterator[tuple[int, int, int, int]]:
        """Phrases that another sentence has paraphrases of: both starts and lengths."""
        places, words = other.places, other.words
        for start, length, paraphrase in self.rewritings:
            for at in places.get(paraphrase[0], ()):
                size = len(paraphrase)
                if tuple(words[at : at + size]) == paraphrase:
                    yield start, length, at, size


def _matches(output: _Sentence, reference: _Sentence) -> list[list[Match]]:
    """By the reference's word: exact matches; then stems, synonyms and paraphrases."""
    exact = output.places
    matches: list[list[Match]] = [
        [Match.of(EXACT, start, 1, at, 1) for at in exact.get(word, ())]
        for start, word in enumerate(reference.words)
    ]
    if output.words == reference.words:
        return matches
    for module, keys_of_words in reference.keys.items():
        places = output.places_of_keys[module]
        for start, (word, keys) in enumerate(zip(reference.words, keys_of_words, strict=True)):
            for at in sorted({at for key in keys for at in places.get(key, ())}):
                if output.words[at] != word:
                    matches[start].append(Match.of(module, start, 1, at, 1))
    for start, length, at, other in reference.rewritten_in(output):
        matches[start].append(Match.of(PARAPHRASE, start, length, at, other))
    for at, other, start, length in output.rewritten_in(reference):
        matches[start].append(Match.of(PARAPHRASE, start, length, at, other))
    return matches


def _places(groups: Iterable[Iterable[str]]) -> dict[str, list[int]]:
    """The numbers of the groups that each member is in."""
    places: dict[str, list[int]] = {}
    for at, members in enumerate(groups):
        for member in members:
            places.setdefault(member, []).append(at)
    return places
