"""TER, the edits of words and the shifts of phrases that turn an output into a reference.

The paper's code takes pyter's, WebNLG's and DART's scorers tercom's; both find shifts greedily, so
the search decides the score. Here it is pyter's, with edits counted faster, and for tercom's
sacrebleu's; references that cannot be the nearest are left out, and so are searches for shifts that
cannot save an edit: no shift changes which words there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count

from lorakit.errors import MissingExtraError

Words = list[str]
_NARROW = 12
"""Edits up to which tercom's search near the diagonal, 25 words to each side, finds all of them."""


def least_ter(output: Words, references: Sequence[Words]) -> float:
    """The edits per word that the nearest of an output's references takes, by pyter's search.

    Args:
        output: its words.
        references: the words of each reference.
    """
    lengths = [max(len(known), 1) for known in references]
    pairs = zip(references, lengths, strict=True)
    bounds = [_fewest(output, known) / length for known, length in pairs]
    return _least(bounds, lambda number: _edits(output, references[number]) / lengths[number])


def tercom_edits() -> Callable[[str, Sequence[str]], float]:
    """A function that gives the edits that the nearest reference of a line takes, as tercom does.

    Raises:
        MissingExtraError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.ter import TER
    except ImportError:
        raise MissingExtraError("TER", "metrics") from None
    ter = TER()

    def edits(line: str, references: Sequence[str]) -> float:
        output, *known = (text.lower().split() for text in (line, *references))
        bounds = [float(_fewest(output, words)) for words in known]

        def of(number: int) -> float:
            distance = _Distance(known[number])(output)
            if distance == bounds[number] and distance <= _NARROW:
                return float(distance)
            return float(ter.sentence_score(line, [references[number]]).num_edits)

        return _least(bounds, of)

    return edits


def _least(bounds: Sequence[float], cost: Callable[[int], float]) -> float:
    """The least of several costs, of which those are computed whose lower bounds leave a chance."""
    best = float("inf")
    for bound, number in sorted(zip(bounds, count(), strict=False)):
        if bound < best:
            best = min(best, cost(number))
    return best


def _edits(output: Words, reference: Words) -> int:
    """Edits and shifts by pyter's search.

    Of the shifts that leave the fewest edits it takes the one whose words are the last in order.
    """
    distance = _Distance(reference)
    fewest = _fewest(output, reference)
    shifts, edits = 0, distance(output)
    while edits > fewest:
        moved = [(distance(words), words) for words in _shifted(output, reference)]
        left = min((each for each, _ in moved), default=edits)
        if left >= edits:
            break
        output = max(words for each, words in moved if each == left)
        shifts, edits = shifts + 1, left
    return shifts + edits


def _fewest(output: Words, reference: Words) -> int:
    """The edits that words which only one side has take at least."""
    shared = (Counter(output) & Counter(reference)).total()
    return max(len(output), len(reference)) - shared


def _shifted(output: Words, reference: Words) -> Iterator[Words]:
    """The output with each phrase that both have moved to its place in the reference."""
    for start in range(len(output)):
        for place in range(len(reference)):
            length = 0
            for ours, theirs in zip(output[start:], reference[place:], strict=False):
                if ours != theirs:
                    break
                length += 1
            if length and start != place:
                rest = output[:start] + output[start + length :]
                yield rest[:place] + output[start : start + length] + rest[place:]


class _Distance:
    """The edit distance of words to a reference, all of a column at once in the bits of a number.

    By Myers (1999) in the form of Hyyrö (2003).
    """

    def __init__(self, reference: Words) -> None:
        self._length = len(reference)
        self._places: dict[str, int] = {}
        for at, word in enumerate(reference):
            self._places[word] = self._places.get(word, 0) | 1 << at

    def __call__(self, words: Words) -> int:
        """Insertions, deletions and replacements of words."""
        if not self._length:
            return len(words)
        places, distance = self._places, self._length
        last, whole = 1 << distance - 1, (1 << distance) - 1
        # Where a cell of the column is one more, or one less, than the cell above it.
        more, less = whole, 0
        for word in words:
            equal = places.get(word, 0)
            either = equal | less
            across = ((equal & more) + more ^ more) | equal
            right_more = less | whole & ~(across | more)
            right_less = more & across
            if right_more & last:
                distance += 1
            elif right_less & last:
                distance -= 1
            right_more = (right_more << 1 | 1) & whole
            right_less = right_less << 1 & whole
            more = right_less | whole & ~(either | right_more)
            less = right_more & either
        return distance
