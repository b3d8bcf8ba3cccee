"""METEOR 1.5 of a file of outputs, and of one segment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from lorakit.data.metrics.meteor.align import EXACT, Match, align, chunks_of
from lorakit.data.metrics.meteor.normalize import normalized_words
from lorakit.data.metrics.meteor.tables import Phrase, Tables, tables

# The parameters for English, task "rank" (Denkowski and Lavie, 2014, table 2).
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
MODULE_WEIGHTS = (1.0, 0.6, 0.8, 0.6)
STEM, SYNONYM, PARAPHRASE = 1, 2, 3


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
class _Statistics:
    """What METEOR sums over segments."""

    output: _Side = field(default_factory=_Side)
    reference: _Side = field(default_factory=_Side)
    chunks: int = 0

    def __add__(self, other: _Statistics) -> _Statistics:
        # The chunk of a segment that is all right is no fragment.
        chunks = 0 if other.perfect else other.chunks
        return _Statistics(
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
        words = normalized(output)
        segments.append(
            max(
                (matcher.statistics(words, normalized(line)) for line in known),
                key=lambda statistics: statistics.score,
            )
        )
    total = sum(segments, start=_Statistics())
    return total.score, [segment.score for segment in segments]


class _Matcher:
    """Finds the words of two sentences that match."""

    def __init__(self, lists: Tables, paraphrases: Mapping[Phrase, list[Phrase]]) -> None:
        from nltk.stem.snowball import SnowballStemmer

        self.lists = lists
        self.paraphrases = paraphrases
        self.longest = max(map(len, paraphrases), default=0)
        self.stem = cache(SnowballStemmer("english").stem)

    def statistics(self, output: list[str], reference: list[str]) -> _Statistics:
        """The counts of the best alignment."""
        alignment = align(self._matches(output, reference))
        return _Statistics(
            self._side(output, [(m.module, m.output_start, m.output_length) for m in alignment]),
            self._side(reference, [(m.module, m.start, m.length) for m in alignment]),
            chunks_of(alignment),
        )

    def _side(self, words: list[str], matches: list[tuple[int, int, int]]) -> _Side:
        function = [word in self.lists.function_words for word in words]
        counts = {True: [0, 0, 0, 0], False: [0, 0, 0, 0]}
        for module, start, length in matches:
            for is_function in function[start : start + length]:
                counts[is_function][module] += 1
        return _Side(len(words), sum(function), tuple(counts[False]), tuple(counts[True]))

    def _matches(self, output: list[str], reference: list[str]) -> list[list[Match]]:
        """By the reference's word: exact matches; then stems, synonyms and paraphrases."""
        matches: list[list[Match]] = [[] for _ in reference]
        places = _places(output)
        for start, word in enumerate(reference):
            matches[start] += [Match.of(EXACT, start, 1, at, 1) for at in places.get(word, ())]
        if output == reference:
            return matches
        stems = _places([self.stem(word) for word in output])
        synonyms = _places_of_members([self.lists.synsets(word) for word in output])
        for module, found in ((STEM, stems), (SYNONYM, synonyms)):
            for start, word in enumerate(reference):
                keys = {self.stem(word)} if module == STEM else self.lists.synsets(word)
                alike = sorted({at for key in keys for at in found.get(key, ())})
                others = (at for at in alike if output[at] != word)
                matches[start] += [Match.of(module, start, 1, at, 1) for at in others]
        for start, length, at, other in self._paraphrased(reference, output):
            matches[start].append(Match.of(PARAPHRASE, start, length, at, other))
        for at, other, start, length in self._paraphrased(output, reference):
            matches[start].append(Match.of(PARAPHRASE, start, length, at, other))
        return matches

    def _paraphrased(self, words: list[str], others: list[str]) -> list[tuple[int, int, int, int]]:
        """Phrases of one sentence that the other has paraphrases of: both starts and lengths."""
        found = []
        first_words = _places(others)
        for start in range(len(words)):
            for length in range(1, min(self.longest, len(words) - start) + 1):
                for paraphrase in self.paraphrases.get(tuple(words[start : start + length]), ()):
                    size = len(paraphrase)
                    found += [
                        (start, length, at, size)
                        for at in first_words.get(paraphrase[0], ())
                        if tuple(others[at : at + size]) == paraphrase
                    ]
        return found


def _places(words: Sequence[str]) -> dict[str, list[int]]:
    """Where each word is."""
    places: dict[str, list[int]] = {}
    for at, word in enumerate(words):
        places.setdefault(word, []).append(at)
    return places


def _places_of_members(groups: Sequence[Iterable[str]]) -> dict[str, list[int]]:
    """Where each member of some group is."""
    places: dict[str, list[int]] = {}
    for at, members in enumerate(groups):
        for member in members:
            places.setdefault(member, []).append(at)
    return places
