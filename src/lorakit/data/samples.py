"""Samples: a row as tokens and labels, and the report of how rows became samples."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from lorakit.data.report import EncodingReport


class TokenSpan(NamedTuple):
    """The first and the last token of an answer within a sequence."""

    start: int
    end: int


class ByToken(ABC):
    """What is known of each token of a sample beside its label."""

    @abstractmethod
    def moved(self, order: Sequence[int]) -> ByToken:
        """The same of a longer sequence, each of whose positions has a source, or is virtual."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFile:
    """The file of an image, which is read again for each batch."""

    path: Path
    digest: str
    """SHA-256 of its content when it was first read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sample: a row as tokens, or an image, and labels."""

    input_ids: list[int]
    labels: list[int] | tuple[float, ...] | TokenSpan | int | float
    """A label per token (IGNORED: no target), one per class (0 or 1), a `TokenSpan`, the number of
    the class, or the number to predict."""
    token_type_ids: list[int] | None = None
    """Which text of a pair each token is from, 0 or 1, for models with token types."""
    image: ImageFile | None = None
    """The image that it has in the place of tokens."""
    rejected: Example | None = None
    """The same prompt with the rejected answer, where this one has the chosen."""
    decoder_input_ids: list[int] | None = None
    """What the decoder of an encoder-decoder reads, whose tokens the labels are; None: it has no
    encoder."""
    predicts_next: bool = True
    """Whether labels per token are of tokens that the ones before predict; else a token has its
    own."""
    about: ByToken | None = None
    """What its answer is read with."""
    others: tuple[Example, ...] = ()
    """Further texts of the row, as samples of their own, in which it has no labels."""

    def beside(self, others: Iterable[Example]) -> Example:
        """The sample with further texts."""
        return replace(self, others=tuple(others))


def flattened(examples: Sequence[Example]) -> list[Example]:
    """All texts of samples: the first ones of all, then the second ones, and so on."""
    return [
        *examples,
        *(text for texts in zip(*(e.others for e in examples), strict=True) for text in texts),
    ]


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Samples in the order of their rows: a data set of torch's map style."""

    examples: tuple[Example, ...]
    report: EncodingReport
    ends: tuple[int, ...] = ()
    """The tokens that ended the targets, in ascending order."""

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the samples in their order: tokens, labels, and which text tokens are from."""
        content = hashlib.sha256()
        for each in self.examples:
            content.update(repr((each.input_ids, each.labels, each.token_type_ids)).encode())
            if each.image is not None:
                content.update(each.image.digest.encode())
            if each.rejected is not None:
                content.update(repr((each.rejected.input_ids, each.rejected.labels)).encode())
            if each.decoder_input_ids is not None:
                content.update(repr(each.decoder_input_ids).encode())
            if each.others:
                content.update(repr([text.input_ids for text in each.others]).encode())
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """The sample of a row, or the reason why there is none, and what was cut from it."""

    example: Example | None = None
    dropped: str = ""
    cut_prompt: bool = False
    cut_completion: bool = False
    ends: frozenset[int] = frozenset()
    """The tokens that end its targets."""
    unwritten: frozenset[str] = frozenset()
    """Keys of messages that the chat template does not write."""
