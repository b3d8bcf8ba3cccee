"""The positions of virtual tokens in a sequence: before the prompt, and right after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.data.chat import IGNORED
from lorakit.data.samples import Encoded, Example, TokenSpan


@dataclass(frozen=True, kw_only=True)
class VirtualTokens:
    """The virtual tokens of one adapter. Their ids follow the last one of the base's vocabulary."""

    first: int
    """Id of the first of them: the number of rows of the base's input embedding."""
    prefix: int
    """The number of virtual tokens before the prompt."""
    infix: int
    """The number of virtual tokens right after the prompt."""
    causal: bool
    """Whether attention is causal, or the row an encoder's for a decoder. Where neither is, as in
    BERT, the prefix follows the first token, which a classifier reads."""

    def __len__(self) -> int:
        return self.prefix + self.infix

    def order(self, length: int, prompt: int) -> list[int]:
        """The source of each position of the longer sequence.

        It is a position of the original sequence, or ~n for virtual token n. Without a prompt there
        is no infix.

        Args:
            length: tokens of the original sequence.
            prompt: how many of them are the prompt.
        """
        lead = 0 if self.causal else min(1, prompt)
        before = [~number for number in range(self.prefix)]
        after = [~number for number in range(self.prefix, len(self))] if prompt else []
        return [*range(lead), *before, *range(lead, prompt), *after, *range(prompt, length)]

    def into(self, example: Example) -> Example:
        """A sample with the virtual tokens; they are no targets.

        The prompt ends before the first target token, if that is predicted by those before it; else
        it is the whole sequence. A first token that is a target cannot be predicted without virtual
        tokens. It is no target here either, so that losses with and without them are of the same
        tokens.
        """
        ids, labels, types = example.input_ids, example.labels, example.token_type_ids
        # Of an encoder-decoder the labels are the decoder's tokens.
        own = isinstance(labels, list) and example.decoder_input_ids is None
        predicts = own and example.predicts_next
        prompt = prompt_length(labels) if isinstance(labels, list) and predicts else len(ids)
        order = self.order(len(ids), prompt)
        if isinstance(labels, list) and own:
            given = [IGNORED, *labels[1:]] if predicts else labels
            labels = [IGNORED if at < 0 else given[at] for at in order]
        if isinstance(labels, TokenSpan):
            labels = TokenSpan(order.index(labels.start), order.index(labels.end))
        if types is not None:
            types = [types[at] for at in neighbours(order)]
        return replace(
            example,
            input_ids=[self.first + ~at if at < 0 else ids[at] for at in order],
            labels=labels,
            token_type_ids=types,
            about=None if example.about is None else example.about.moved(order),
            others=tuple(map(self.into, example.others)),
        )

    def into_all(self, encoded: Encoded) -> Encoded:
        """All samples with the virtual tokens."""
        return replace(encoded, examples=tuple(self.into(each) for each in encoded.examples))


def prompt_length(labels: Sequence[int]) -> int:
    """The number of tokens before the first target token."""
    return next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))


def neighbours(order: Sequence[int]) -> list[int]:
    """The original position for each position of the longer sequence; its neighbour's if virtual.

    A virtual token takes the position of the token before it, or 0 where none precedes.
    """
    found, latest = [], 0
    for at in order:
        latest = at if at >= 0 else latest
        found.append(latest)
    return found
