"""Where virtual tokens stand in a row: before the prompt, and right after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat import IGNORED
from lorakit.data.encode import Encoded, Example


@dataclass(frozen=True, kw_only=True)
class VirtualTokens:
    """The virtual tokens of one adapter. Their ids follow the last one of the base's vocabulary."""

    first: int
    """Id of the first of them: the rows of the base's input embedding."""
    prefix: int
    """How many stand before the prompt."""
    infix: int
    """How many stand right after it."""
    causal: bool
    """Whether a token sees those before it alone. Where it sees all, as in BERT, the prefix goes
    behind the first token, which a classifier reads."""

    def __len__(self) -> int:
        return self.prefix + self.infix

    def order(self, length: int, prompt: int) -> list[int]:
        """Return what stands at each place of the longer row.

        That is a place in the row, or ~n for the virtual token with number n. Where no prompt
        precedes, there is no infix.

        Args:
            length: tokens of the row.
            prompt: how many of them are the prompt.
        """
        lead = 0 if self.causal else min(1, prompt)
        before = [~number for number in range(self.prefix)]
        after = [~number for number in range(self.prefix, len(self))] if prompt else []
        return [*range(lead), *before, *range(lead, prompt), *after, *range(prompt, length)]

    def into(self, example: Example) -> Example:
        """A row with the virtual tokens; they have no labels.

        The prompt ends before the first label; of a row to classify, with the row. A first token
        that has a label is given to the model without virtual tokens, and is not learnt here
        either, so that losses are of the same tokens.
        """
        ids, labels, types = example.input_ids, example.labels, example.token_type_ids
        prompt = prompt_length(labels) if isinstance(labels, list) else len(ids)
        order = self.order(len(ids), prompt)
        if isinstance(labels, list):
            given = [IGNORED, *labels[1:]]
            labels = [IGNORED if at < 0 else given[at] for at in order]
        if types is not None:
            types = [types[at] for at in neighbours(order)]
        return replace(
            example,
            input_ids=[self.first + ~at if at < 0 else ids[at] for at in order],
            labels=labels,
            token_type_ids=types,
        )

    def into_all(self, encoded: Encoded) -> Encoded:
        """Return rows with the virtual tokens."""
        return replace(encoded, examples=tuple(self.into(each) for each in encoded.examples))


def prompt_length(labels: Sequence[int]) -> int:
    """Return how many tokens come before the first that has a label."""
    return next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))


def neighbours(order: Sequence[int]) -> list[int]:
    """Return, for each place of a longer row, its place in the row, or that of the token before.

    What nothing precedes goes with the first token.
    """
    found, latest = [], 0
    for at in order:
        latest = at if at >= 0 else latest
        found.append(latest)
    return found
