"""TER, the edits of words and the shifts of phrases that turn an output into a reference.

The paper's code takes pyter's, WebNLG's and DART's scorers tercom's (7.25); both find shifts
greedily, so the search decides the score. Here they are those searches, with edits counted faster;
sacrebleu's differs from tercom's in where phrases go, and in which it tries. What cannot change the
result is left out: references that cannot be the nearest, searches where no shift can save an edit,
since none changes which words there are, and shifts that cannot save as many as the best one so
far. A shift of L words over G others takes 2·min(L, G) edits at most, so that it saves no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count

from lorakit.data.metrics.tercom_beam import BEAM, beam_edits

Words = list[str]
_LONGEST, _FARTHEST = 10, 50
"""tercom's longest phrase, and the farthest that it takes one."""


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


def tercom_edits(output: Words, references: Sequence[Words]) -> float:
    """The edits that the nearest of an output's references takes, by tercom's search.

    Args:
        output: its words, lower-cased as tercom does it.
        references: the words of each reference.
    """
    pairs = [_Pair(output, known) for known in references]
    bounds = [float(pair.least) for pair in pairs]
    return _least(bounds, lambda number: float(_by_tercom(pairs[number])))


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
    """Edits and shifts by tercom's search.

    Of the shifts that save the most it takes the longest phrase, and of these the first. No path
    of few edits leaves its beam.
    """
    if pair.edits > BEAM:
        return _by_tercom_in_its_beam(pair)
    output, edits, shifts = pair.output, pair.edits, 0
    while edits > pair.fewest:
        columns = pair.distance.columns(output)
        best, words = (0, 0), output
        for move in _tercom_moves(pair, output, _alignment(output, pair.reference, columns)):
            start, length, place = move
            saved = min(_most_saved(move), edits - pair.fewest)
            if (saved, length) <= best or not saved:
                continue
            moved = _moved(output, move)
            saved = edits - pair.distance.going_on(columns, min(start, place), moved)
            if saved > 0 and (saved, length) > best:
                best, words = (saved, length), moved
        if not best[0]:
            break
        output, edits, shifts = words, edits - best[0], shifts + 1
    return shifts + edits


def _by_tercom_in_its_beam(pair: _Pair) -> int:
    """Edits and shifts by tercom's search, where its beam may end paths.

    There a shift can save more than twice its words. So what tercom leaves out is left out here:
    phrases that are too short to save more than is saved already.
    """
    output, reference, shifts = pair.output, pair.reference, 0
    edits, path = beam_edits(output, reference)
    while edits > pair.fewest:
        moves = list(_tercom_moves(pair, output, _aligned_by(path, len(output), len(reference))))
        moves.sort(key=lambda move: -move[1])
        best, words, kept = 0, output, path
        for move in moves:
            if best > 2 * move[1]:
                break
            moved = _moved(output, move)
            if edits - pair.distance.columns(moved)[-1][2] <= best:
                continue
            found, found_path = beam_edits(moved, reference)
            if edits - found > best:
                best, words, kept = edits - found, moved, found_path
        if not best:
            break
        output, path, edits, shifts = words, kept, edits - best, shifts + 1
    return shifts + edits


_Alignment = tuple[list[int], int, int]
"""The number of a word of the output for each word of the reference, the last one up to it, -1
before the first; and as bits the words of the output and those of the reference that are no
match."""


def _tercom_moves(pair: _Pair, output: Words, alignment: _Alignment) -> Iterator[_Move]:
    """The shifts that tercom tries.

    A phrase and the place in the reference where it is too must both have an error in the
    alignment, and the phrase must not be aligned with that place. A phrase is made longer while
    there is such a place.
    """
    aligned, wrong, wrong_there = alignment
    for start, word in enumerate(output):
        places = pair.places.get(word, ())
        same = {place: _same(output, start, pair.reference, place) for place in places}
        if not any(
            aligned[place] != start and -_FARTHEST - 1 <= aligned[place] - start <= _FARTHEST
            for place in places
        ):
            continue
        for length in range(1, _LONGEST + 1):
            here = [place for place in places if same[place] >= length]
            errors = (1 << length) - 1
            if here and not wrong >> start & errors:
                continue
            free = [
                place
                for place in here
                if not start <= aligned[place] < start + length
                and abs(aligned[place] - start) <= _FARTHEST
            ]
            if not free:
                break
            for place in free:
                if wrong_there >> place & errors:
                    for after in _targets(aligned, start, length, place):
                        yield start, length, _place(start, length, after)


def _targets(aligned: Sequence[int], start: int, length: int, place: int) -> Iterator[int]:
    """The words of the output behind which tercom puts a phrase; -1 is before the first.

    Args:
        aligned: of each word of the reference the word of the output.
        start: the phrase's first word.
        length: its words.
        place: where it is in the reference.
    """
    for at in range(place - 1, place + length):
        if at < 0:
            yield -1
        elif aligned[at] != start and (at == place or aligned[at] != aligned[place]):
            yield aligned[at]


def _place(start: int, length: int, after: int) -> int:
    """The place, in the words that are left, of a phrase that is put behind a word."""
    if after < start:
        return after + 1
    # Behind a word of its own it goes as many words on as that is from its first.
    return after if after < start + length else after + 1 - length


def _aligned_by(path: str, output_words: int, reference_words: int) -> _Alignment:
    """The alignment of a path's steps."""
    aligned = [-1] * reference_words
    wrong, wrong_there = (1 << output_words) - 1, (1 << reference_words) - 1
    row = column = 0
    for step in path:
        row, column = row + (step != "d"), column + (step != "i")
        if step != "i":
            aligned[column - 1] = row - 1
        if step == "=":
            wrong, wrong_there = wrong ^ 1 << row - 1, wrong_there ^ 1 << column - 1
    return aligned, wrong, wrong_there


def _alignment(output: Words, reference: Words, columns: Sequence[_Column]) -> _Alignment:
    """The alignment of the path that tercom takes of those with the fewest edits.

    Args:
        output: its words.
        reference: its words.
        columns: of the output's words.
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
