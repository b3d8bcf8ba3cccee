"""How much of a prompt is read between two decode steps, by how long both take here."""

from __future__ import annotations

from dataclasses import dataclass

MOST_STEPS = 2.75
"""Decode steps that a stream may wait for its next token where one prompt is read meanwhile: for
the reading and the step that follows it, or for one pass that does both."""

CHUNK = 16
"""The tokens of a prompt that are read in any case: fewer take hardly less time."""

MULTIPLE = 8
"""Of so many tokens parts are multiples."""

NEWEST = 0.25
"""The share of the latest pass in a running mean."""


@dataclass
class _Passes:
    """Running means over forward passes of one kind."""

    tokens: float = 0.0
    seconds: float = 0.0

    def count(self, tokens: int, seconds: float) -> None:
        """Count one more; the first one is the mean."""
        share = NEWEST if self.tokens else 1.0
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)


class Pace:
    """Measures decode steps and passes that read prompts.

    A pass takes a time of its own and more for each token. Both follow from the two kinds of
    passes, since a step is a pass of few tokens.
    """

    def __init__(self) -> None:
        self._steps, self._reads = _Passes(), _Passes()
        self._knows_one = False
        """Whether a pass of one prompt was counted."""

    def stepped(self, rows: int, seconds: float) -> None:
        """Count a decode step."""
        self._steps.count(rows, seconds)

    def read(self, tokens: int, seconds: float, *, prompts: int = 1) -> None:
        """Count a pass that read so many prompts, of so many tokens with padding.

        Those of several cost less for each token, and count only as long as there is no other.
        """
        if prompts > 1 and self._knows_one:
            return
        if prompts == 1 and not self._knows_one:
            self._reads, self._knows_one = _Passes(), True
        self._reads.count(tokens, seconds)

    def share(self, most: int, *, joined: int = 0) -> int:
        """The tokens of one prompt that may be read before the next step of the answers.

        Args:
            most: of all prompts together.
            joined: the rows of the step, if it is computed in the same pass.
        """
        steps, reads = self._steps, self._reads
        if not (steps.seconds and reads.seconds):
            return most
        per_token = reads.seconds / reads.tokens
        limit = MOST_STEPS if joined else MOST_STEPS - 1
        if reads.tokens >= 2 * steps.tokens:
            slope = (reads.seconds - steps.seconds) / (reads.tokens - steps.tokens)
            # Single passes vary; a slope near zero would mean prompts of any length at once.
            per_token = max(slope, per_token / 4)
            tokens = steps.tokens + (limit - 1) * steps.seconds / per_token
        else:
            tokens = limit * steps.seconds / per_token
        tokens -= joined
        return min(most, max(CHUNK, int(tokens) // MULTIPLE * MULTIPLE))
