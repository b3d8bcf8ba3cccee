"""The alignment of two sentences that METEOR scores: a beam search over matches of words.

The search follows METEOR 1.5 (Denkowski and Lavie, 2014) to its last peculiarity, because the
choice among equal alignments shows in the fourth decimal: while paths are compared, a match that is
not exact counts half its words, rounded down; the distance of every match that is tried is added to
the path that it is tried on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
    def of(
        cls, module: int, start: int, length: int, output_start: int, output_length: int
    ) -> Match:
        """A match, with what follows from its place."""
        exact = module == EXACT
        weight = 2 if exact else length // 2 + output_length // 2
        words, output_words = (1 << length) - 1 << start, (1 << output_length) - 1 << output_start
        return cls(module, start, length, output_start, output_length, words, output_words, weight)


class _Path:
    """A part of an alignment, from the reference's first word to the present one."""

    __slots__ = ("chosen", "chunks", "distance", "end", "next", "used", "used_output", "weight")

    def __init__(self, chosen: tuple[Match, ...], used: int, used_output: int) -> None:
        self.chosen = chosen
        self.used = used
        self.used_output = used_output
        self.weight = self.chunks = self.distance = self.next = 0
        self.end = -1

    def copy(self) -> _Path:
        """The same path, to go on with otherwise."""
        path = _Path(self.chosen, self.used, self.used_output)
        path.weight, path.chunks, path.distance = self.weight, self.chunks, self.distance
        path.next, path.end = self.next, self.end
        return path

    def take(self, match: Match) -> None:
        """Go to the end of a match."""
        self.weight += match.weight
        if self.end not in (-1, match.output_start):
            self.chunks += 1
        self.next = match.start + match.length
        self.end = match.output_start + match.output_length

    def close_chunk(self) -> None:
        """End the chunk that is open, if any."""
        if self.end != -1:
            self.chunks += 1
            self.end = -1

    def key(self) -> tuple[int, int, int]:
        """What paths are sorted by: words that match, then chunks, then distance."""
        return -self.weight, self.chunks, self.distance


def align(matches: Sequence[Sequence[Match]]) -> list[Match]:
    """The best alignment, in the reference's order.

    Args:
        matches: for each word of the reference the matches that start there, in the order of the
            modules.
    """
    fixed = _fixed(matches)
    start = _Path(
        tuple(fixed.values()),
        sum(match.words for match in fixed.values()),
        sum(match.output_words for match in fixed.values()),
    )
    paths = [start]
    for position, here in enumerate(matches):
        paths = _advance(sorted(paths, key=_Path.key)[:BEAM], position, here, fixed)
    paths = sorted(paths, key=_Path.key)[:BEAM]
    for path in paths:
        path.close_chunk()
    return sorted(min(paths, key=_Path.key).chosen, key=lambda match: match.start)


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


def _advance(
    paths: Sequence[_Path], position: int, matches: Sequence[Match], fixed: dict[int, Match]
) -> list[_Path]:
    """The paths one word further on: each match that starts there taken, or none."""
    following: list[_Path] = []
    bit = 1 << position
    for path in paths:
        if path.used & bit:
            if position >= path.next:
                match = fixed.get(path.next)
                if match is None:
                    continue
                path.take(match)
                path.distance += abs(match.start - match.output_start)
            following.append(path)
            continue
        for match in matches:
            if path.used & match.words or path.used_output & match.output_words:
                continue
            longer = path.copy()
            longer.chosen = (*path.chosen, match)
            longer.used |= match.words
            longer.used_output |= match.output_words
            longer.take(match)
            path.distance += abs(match.start - match.output_start)
            following.append(longer)
        path.close_chunk()
        path.next += 1
        following.append(path)
    return following or list(paths[:1])


def chunks_of(alignment: Sequence[Match]) -> int:
    """How many runs of matches are adjacent, and in the same order, in both sentences."""
    chunks = 0
    end = output_end = -1
    for match in alignment:
        chunks += match.start != end or match.output_start != output_end
        end = match.start + match.length
        output_end = match.output_start + match.output_length
    return chunks
