"""The alignment of two sentences that METEOR scores: a beam search over matches of words.

The search follows METEOR 1.5 (Denkowski and Lavie, 2014) to its last peculiarity, because the
choice among equal alignments shows in the fourth decimal: while paths are compared, a match that is
not exact counts half its words, rounded down; the distance of every match that is tried is added to
the path that it is tried on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

BEAM = 40
EXACT = 0


class Match(NamedTuple):
    """Words of the reference that words of the output may stand for."""

    module: int
    """How they match: exactly (0), by stem, synonym or paraphrase."""
    start: int
    length: int
    """Words in the reference: the first, and how many."""
    output_start: int
    output_length: int
    """Words in the output."""
    words: int
    output_words: int
    """The words that it covers in each, as bits."""
    weight: int
    """What it counts in the search."""

    @classmethod
    @lru_cache(1_000_000)
    def of(
        cls, module: int, start: int, length: int, output_start: int, output_length: int
    ) -> Match:
        """A match, with what follows from its place."""
        exact = module == EXACT
        weight = 2 if exact else length // 2 + output_length // 2
        words, output_words = (1 << length) - 1 << start, (1 << output_length) - 1 << output_start
        return cls(module, start, length, output_start, output_length, words, output_words, weight)


Chain = tuple[Any, Match] | None
"""The matches that a path has chosen: those before the last one, as another chain, and it."""

_Path = tuple[int, int, int, int, int, Chain]
"""A part of an alignment, from the reference's first word to the present one: minus the words that
match, then the chunks, then the distance, as one number; the reference's next word, the end of the
last match in the output; the words in use in both, as bits; the chosen matches."""

_CHUNK = 1 << 24
_WORD = 1 << 40
"""What a chunk and a word count in that number, so that neither distances nor chunks reach them."""
_KEY = itemgetter(0)


def align(matches: Sequence[Sequence[Match]]) -> list[Match]:
    """The best alignment, in the reference's order.

    Args:
        matches: for each word of the reference the matches that start there, in the order of the
            modules.
    """
    fixed = _fixed(matches)
    used = sum(match.words for match in fixed.values())
    used_output = sum(match.output_words for match in fixed.values())
    paths: list[_Path] = [(0, 0, -1, used, used_output, None)]
    for position, here in enumerate(matches):
        if len(paths) > 1:
            paths.sort(key=_KEY)
        if position in fixed:
            paths = _with_fixed(paths[:BEAM], fixed[position])
        else:
            paths = _advance(paths[:BEAM], position, here)
    paths.sort(key=_KEY)
    # The chunk that is open at the end counts too.
    closed = [(path[0] + _CHUNK * (path[2] != -1), path[5]) for path in paths[:BEAM]]
    chosen = [*fixed.values(), *_unchained(min(closed, key=_KEY)[1])]
    return sorted(chosen, key=lambda match: match.start)


def _fixed(matches: Sequence[Sequence[Match]]) -> dict[int, Match]:
    """The matches that have no rival for any of their words, by their start."""
    seen = seen_twice = seen_output = seen_output_twice = 0
    for here in matches:
        for match in here:
            words, output_words = match.words, match.output_words
            seen_twice |= seen & words
            seen |= words
            seen_output_twice |= seen_output & output_words
            seen_output |= output_words
    return {
        start: here[0]
        for start, here in enumerate(matches)
        if len(here) == 1
        and not here[0].words & seen_twice
        and not here[0].output_words & seen_output_twice
    }


def _advance(paths: Sequence[_Path], position: int, matches: Sequence[Match]) -> list[_Path]:
    """The paths one word further on: each match that starts there taken, or none."""
    following: list[_Path] = []
    bit = 1 << position
    # Taken apart once, since there are up to BEAM paths.
    choices = [
        (
            *(match.words, match.output_words, match.weight * _WORD, position + match.length),
            *(match.output_start, match.output_start + match.output_length),
            abs(match.start - match.output_start),
            match,
        )
        for match in matches
    ]
    for path in paths:
        number, here, end, used, used_output, chosen = path
        if used & bit:
            if position < here:
                following.append(path)
            continue
        # A match that does not go on where the last one ended closes its chunk.
        closed = number + _CHUNK if end != -1 else number
        # Written out, since this is where most of the time goes.
        for words, output_words, own, stop, start, output_stop, apart, match in choices:
            if used & words or used_output & output_words:
                continue
            following.append(
                (
                    (number if end == start else closed) - own,
                    stop,
                    output_stop,
                    used | words,
                    used_output | output_words,
                    (chosen, match),
                )
            )
            number += apart
            closed += apart
        following.append((closed, here + 1, -1, used, used_output, chosen))
    return following or list(paths[:1])


def _with_fixed(paths: Sequence[_Path], match: Match) -> list[_Path]:
    """The paths after a match without rivals, whose words they all count as used."""
    start, stop = match.output_start, match.start + match.length
    output_stop = match.output_start + match.output_length
    more = abs(match.start - start) - match.weight * _WORD
    return [
        (
            number + more + _CHUNK * (end != -1 and end != start),
            stop,
            output_stop,
            used,
            used_output,
            chosen,
        )
        for number, _, end, used, used_output, chosen in paths
    ]


def _unchained(chain: Chain) -> Iterator[Match]:
    while chain is not None:
        chain, match = chain
        yield match


def chunks_of(alignment: Sequence[Match]) -> int:
    """How many runs of matches are adjacent, and in the same order, in both sentences."""
    chunks = 0
    end = output_end = -1
    for match in alignment:
        chunks += match.start != end or match.output_start != output_end
        end = match.start + match.length
        output_end = match.output_start + match.output_length
    return chunks
