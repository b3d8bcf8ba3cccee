"""The requests in slots, and the next token of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit.serving.grammars import GrammarError
from lorakit.serving.prompt_reading import Prompt
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Request
from lorakit.serving.sampling import Sampler, Token
from lorakit.serving.text import GrowingText


@dataclass(eq=False)
class Row:
    """A request in its slot."""

    request: Request
    slot: int
    sampler: Sampler
    text: GrowingText
    prompt: Prompt | None
    """The prompt, until it is in the slot."""
    ids: list[int] = field(default_factory=list)
    """The tokens of the answer."""
    last: int = 0
    """The latest token, which the next step reads."""
    count: int = 0
    """The tokens of the answer."""


def broken_rows(logits: Tensor) -> Collection[int]:
    """The rows of logits (rows, vocabulary), or of embeddings, that are no numbers.

    Where a hidden state is infinite or NaN, the last norm makes all of a row NaN. What has no
    columns has no such rows.
    """
    broken = logits[:, :1].isnan().any(1)
    return set(broken.nonzero()[:, 0].tolist()) if bool(broken.any()) else ()


def no_numbers(request: Request, dtype: torch.dtype) -> RefusalError:
    """What is wrong where a model's logits for a request are no numbers."""
    names = ", ".join(request.use.names) or "the base"
    precision = str(dtype).removeprefix("torch.")
    return RefusalError(
        f"{names} gave no numbers (NaN): values of the weights are too large for {precision}; "
        "was the training stable, and does a server in float32 answer?",
        500,
    )


def latest(rows: Sequence[Row]) -> list[int]:
    """The tokens that a step of the first slots reads, up to the last one that answers."""
    tokens = [0] * (1 + max(row.slot for row in rows))
    for row in rows:
        tokens[row.slot] = row.last
    return tokens


def chosen(rows: Iterable[Row], logits: Tensor) -> list[Token | GrammarError]:
    """The next token of each row, or why it has none; logits are those of all slots."""
    likeliest: list[int] = []
    found: list[Token | GrammarError] = []
    for row in rows:
        if not row.sampler.is_plain:
            try:
                found.append(row.sampler.choose(logits[row.slot]))
            except GrammarError as error:
                found.append(error)
            continue
        likeliest = likeliest or logits.argmax(-1).tolist()
        found.append(row.sampler.chosen(logits[row.slot], likeliest[row.slot]))
    return found
