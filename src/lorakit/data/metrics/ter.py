"""TER, the edits of words and the shifts of phrases that turn an output into a reference.

The paper's code takes pyter's, WebNLG's and DART's scorers tercom's; both find shifts greedily, so
the search decides the score. Here they are pyter's, and tercom's as sacrebleu has it, with edits
counted faster. What cannot change the result is left out: references that cannot be the nearest,
searches where no shift can save an edit, since none changes which words there are, and shifts that
cannot save as many as the best one so far. A shift of L words over G others takes 2·min(L, G)
edits at most, so that it saves no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count

from lorakit.errors import MissingExtraError

Words = list[str]
_IN_BAND = 46
"""Edits, and words by which the lengths differ, together, up to which no path of the fewest edits
leaves the band that tercom's search keeps to, 25 words above the diagonal and 24 below it. Such a
path leaves the diagonal by half of them at most, and the diagonal is rounded down to a word."""
_LONGEST, _FARTHEST, _MOST = 10, 50, 1000
"""tercom's longest phrase, the farthest place in the reference where it looks for one, and the
shifts that it tries in a search; sacrebleu's limits."""


def least_ter(output: Words, references: Sequence[Words]) -> float:
    """The edits per word that the nearest of an output's references takes, by pyter's search.

    Args:
        output: its words.
        references: the words of each reference.
    """
    lengths = [max(len(known), 1) for known in references]
    pairs = [_Pair(output, known) for known in references]
    bounds = [pair.least / length for pair, length in zip(pairs, lengths, strict=True)]
    return _least(bounds, lambda number: _by_pyter(pairs[number]) / lengths[number])


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
        pairs = [_Pair(output, words) for words in known]

        def of(number: int) -> float:
            pair = pairs[number]
            if pair.edits + abs(len(output) - len(pair.reference)) <= _IN_BAND:
                return float(_by_tercom(pair))
            return float(ter.sentence_score(line, [references[number]]).num_edits)

        return _least([float(pair.least) for pair in pairs], of)

    return edits


def _least(bounds: Sequence[float], cost: Callable[[int], float]) -> float:
    """The least of several costs, of which those are computed whose lower bounds leave a chance."""
    best = float("inf")
    for bound, number in sorted(zip(bounds, count(), strict=False)):
        if bound < best:
            best = min(best, cost(number))
    return best


class _Pair:
    """An output beside a reference."""

    def __init__(self, output: Words, reference: Words) -> None:
        self.output, self.reference = output, reference
        self.places: dict[str, list[int]] = {}
        for at, word in enumerate(reference):
            self.places.setdefault(word, []).append(at)
        self.distance = _Distance(self.places, len(reference))
        self.edits: int = self.distance.columns(output)[-1][2]
        shared = (Counter(output) & Counter(reference)).total()
        self.fewest = max(len(output), len(reference)) - shared
        """The edits that words which only one side has take at least, however they are shifted."""

    @property
    def least(self) -> int:
        """The edits and shifts that there are at least."""
        return self.fewest + (self.edits > self.fewest)


def _by_pyter(pair: _Pair) -> int:
    """Edits and shifts by pyter's search.

    Of the shifts that leave the fewest edits it takes the one whose words are the last in order.
    """
    output, edits, shifts = pair.output, pair.edits, 0
    while edits > pair.fewest:
        columns = pair.distance.columns(output)
        left, best = edits, output
        # Those that can save the most come first, so that others need not be tried.
        moves = sorted(_pyter_moves(pair, output), key=lambda move: -_most_saved(move))
        for move in moves:
            if edits - _most_saved(move) > left:
                break
            words = _moved(output, move)
            found = pair.distance.going_on(columns, min(move[0], move[2]), words)
            if found < left or (found == left < edits and words > best):
                left, best = found, words
        if left >= edits:
            break
        output, edits, shifts = best, left, shifts + 1
    return shifts + edits


_Move = tuple[int, int, int]
"""A phrase's start, its length, and its place in the words that are left without it."""


def _most_saved(move: _Move) -> int:
    """The edits that a shift can save at most."""
    start, length, place = move
    return 2 * min(length, abs(place - start))


def _moved(words: Words, move: _Move) -> Words:
    start, length, place = move
    rest = words[:start] + words[start + length :]
    return rest[:place] + words[start : start + length] + rest[place:]


def _pyter_moves(pair: _Pair, output: Words) -> Iterator[_Move]:
    """Each phrase that both have, as long as it is the same, to its place in the reference."""
    reference = pair.reference
    for start, word in enumerate(output):
        for place in pair.places.get(word, ()):
            if start != place:
                yield start, _same(output, start, reference, place), place


def _same(words: Words, start: int, others: Words, other_start: int) -> int:
    """How many words are the same from two starts on."""
    most = min(len(words) - start, len(others) - other_start)
    return next(
        (n for n in range(most) if words[start + n] != others[other_start + n]),
        most,
    )


def _by_tercom(pair: _Pair) -> int:
    """Edits and shifts by tercom's search, where no path of the fewest edits leaves its band."""
    output, edits, shifts, tried = pair.output, pair.edits, 0, 0
    while edits > pair.fewest:
        columns = pair.distance.columns(output)
        best: tuple[int, int, int, int] = (0, 0, 0, 0)
        words = output
        for start, length, target in _tercom_moves(pair, output, columns):
            tried += 1
            if tried == _MOST:
                # What the search has found does not count then.
                return shifts + edits
            # Of equal savings the longest phrase counts, then the earliest, then its first target.
            place = target if target <= start + length else target - length
            saved = min(_most_saved((start, length, place)), edits - pair.fewest)
            if (saved, length, -start, -target) <= best or not saved:
                continue
            moved = _moved(output, (start, length, place))
            saved = edits - pair.distance.going_on(columns, min(start, place), moved)
            if saved > 0 and (saved, length, -start, -target) > best:
                best, words = (saved, length, -start, -target), moved
        if not best[0]:
            break
        output, edits, shifts = words, edits - best[0], shifts + 1
    return shifts + edits


def _tercom_moves(pair: _Pair, output: Words, columns: Sequence[_Column]) -> Iterator[_Move]:
    """The shifts that tercom tries: each phrase's start, length and target.

    Both the phrase and the place in the reference that it is the same as must have an error in the
    alignment, and the phrase must not be aligned with that place. Its targets are the words of the
    output that are aligned with the words of that place, and with the word before them.
    """
    aligned, wrong, wrong_there = _alignment(output, pair.reference, columns)
    for start, word in enumerate(output):
        for place in pair.places.get(word, ()):
            if abs(place - start) > _FARTHEST:
                continue
            longest = min(_same(output, start, pair.reference, place), _LONGEST)
            for length in range(1, longest + 1):
                here = (1 << length) - 1
                if not (wrong >> start & here and wrong_there >> place & here):
                    continue
                if start <= aligned[place] < start + length:
                    continue
                before = aligned[place - 1] if place else -1
                targets = [at + 1 for at in (before, *aligned[place : place + length])]
                # Words of the reference that nothing stands for are aligned with the same word.
                for target in dict.fromkeys(targets):
                    yield start, length, target


def _alignment(
    output: Words, reference: Words, columns: Sequence[_Column]
) -> tuple[list[int], int, int]:
    """Of each word of the reference the last word of the output up to it, and what is wrong.

    Args:
        output: its words.
        reference: its words.
        columns: of the output's words.

    Returns:
        The number of a word of the output for each word of the reference, -1 before the first; and
        as bits the words of the output and those of the reference that are no match.
    """

    def edits(row: int, column: int) -> int:
        more, less, _ = columns[row]
        above = (1 << column) - 1
        return row + (more & above).bit_count() - (less & above).bit_count()

    aligned, wrong, wrong_there = [-1] * len(reference), 0, 0
    row, column = len(output), len(reference)
    while row or column:
        here = edits(row, column)
        both = bool(row and column)
        matches = both and output[row - 1] == reference[column - 1]
        # A replacement comes before a word too many, and that before one too few.
        if matches or (both and edits(row - 1, column - 1) < here):
            row, column = row - 1, column - 1
            aligned[column] = row
            if not matches:
                wrong, wrong_there = wrong | 1 << row, wrong_there | 1 << column
        elif row and edits(row - 1, column) < here:
            row -= 1
            wrong |= 1 << row
        else:
            column -= 1
            aligned[column] = row - 1
            wrong_there |= 1 << column
    return aligned, wrong, wrong_there


_Column = tuple[int, int, int]
"""Of the edit distances of some words to each beginning of a reference, as bits where a distance is
one more than that of the beginning before, and where it is one less; and the last distance."""


class _Distance:
    """The edit distance of words to a reference, all of a column at once in the bits of a number.

    By Myers (1999) in the form of Hyyrö (2003).
    """

    def __init__(self, places: Mapping[str, Sequence[int]], length: int) -> None:
        self._length = length
        self._places = {word: sum(1 << at for at in found) for word, found in places.items()}

    def columns(self, words: Words, before: _Column | None = None) -> list[_Column]:
        """The column before words, and those after each of them.

        Args:
            words: that are read, insertions, deletions and replacements counting one each.
            before: the column that earlier words have led to.
        """
        places, length = self._places, self._length
        if not length:
            start = before[2] if before else 0
            return [(0, 0, start + number) for number in range(len(words) + 1)]
        last, whole = 1 << length - 1, (1 << length) - 1
        more, less, distance = before or (whole, 0, length)
        found = [(more, less, distance)]
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
            found.append((more, less, distance))
        return found

    def going_on(self, columns: Sequence[_Column], same: int, words: Words) -> int:
        """The distance of words of which the columns of the first so many are known."""
        return self.columns(words[same:], columns[same])[-1][2]
