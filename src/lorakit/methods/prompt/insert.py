"""Virtual tokens inserted into the rows of a batch: the order of each longer row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from lorakit.data.chat import IGNORED
from lorakit.data.virtual_tokens import VirtualTokens, neighbours, prompt_length
from lorakit.errors import RouteError

Ids = Int[Tensor, "rows tokens"]
Longer = Int[Tensor, "rows longer"]


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """One row of a batch."""

    length: int
    """Its positions, padding included."""
    start: int
    """The first position that is not padding."""
    stop: int
    """The position after the last one that is not padding."""
    prompt: int
    """How many of its tokens are the prompt."""
    tokens: VirtualTokens | None
    """What it gets; None: it stays as it is."""

    def order(self) -> list[int]:
        """The token at each position of the longer row; see `VirtualTokens.order`."""
        if self.tokens is None or self.start == self.stop:
            return list(range(self.length))
        inner = self.tokens.order(self.stop - self.start, self.prompt)
        moved = [at + self.start if at >= 0 else at for at in inner]
        return [*range(self.start), *moved, *range(self.stop, self.length)]


class LongerRows:
    """The rows of a batch with the virtual tokens that they get, padded to one length."""

    def __init__(self, rows: Sequence[RowTokens], *, left: bool, device: torch.device) -> None:
        """Lay the rows out.

        Args:
            rows: of equal length.
            left: whether rows that get fewer tokens are padded at their start.
            device: of the tensors.
        """
        self.rows = rows
        orders = [row.order() for row in rows]
        self.length = rows[0].length
        self.longer = max(map(len, orders))
        self.added = [len(order) - self.length for order in orders]
        """Virtual tokens of each row."""
        self.extra = [self.longer - len(order) for order in orders]
        """Padding that each row gets beside its own."""
        self.left = left
        near = [neighbours(order) for order in orders]
        self._device = device
        self._source = self._padded(orders, fill=self.length)
        self._near = self._padded(near, fill=0)
        self.answers = self._tensor([self._answers(at) for at in range(len(rows))])
        """(rows, length): the place in the longer row that answers for each token: its own, and
        in causal models the last of the virtual tokens right behind it."""

    @property
    def is_longer(self) -> bool:
        """Whether any row gets a token."""
        return any(self.added)

    def _tensor(self, rows: list[list[int]]) -> Ids:
        return torch.tensor(rows, device=self._device)

    def _padded(self, rows: list[list[int]], *, fill: int) -> Ids:
        pads = [[fill] * (self.longer - len(row)) for row in rows]
        pairs = zip(pads, rows, strict=True)
        return self._tensor([[*p, *row] if self.left else [*row, *p] for p, row in pairs])

    def _answers(self, number: int) -> list[int]:
        row, order = self.rows[number], self._source[number].tolist()
        causal = row.tokens is not None and row.tokens.causal
        found: dict[int, int] = {}
        latest = None
        for place, at in enumerate(order):
            if 0 <= at < self.length:
                found[at], latest = place, at
            elif at < 0 and causal and latest is not None and latest >= row.start:
                found[latest] = place
        return [found[at] for at in range(self.length)]

    def _taken(self, values: Tensor, *, trained: int | Tensor, padding: int) -> Tensor:
        """The token at each position of the longer rows."""
        wider = torch.cat([values, values.new_full((len(values), 1), padding)], 1)
        taken = wider.gather(1, self._source.clamp(min=0))
        return torch.where(self._source < 0, trained, taken)

    def ids(self, ids: Ids, *, padding: int) -> Longer:
        """The token ids."""
        first = [0 if row.tokens is None else row.tokens.first for row in self.rows]
        numbers = ~self._source + self._tensor([[each] for each in first])
        return self._taken(ids, trained=numbers, padding=padding)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """The attention mask; None where there is no padding."""
        if mask is None:
            if not any(self.extra):
                return None
            mask = torch.ones(len(self.rows), self.length, dtype=torch.long, device=self._device)
        return self._taken(mask, trained=1, padding=0).to(mask.dtype)

    def labels(self, labels: Tensor) -> Tensor:
        """A label per token; nothing predicts a row's first token, as without the others."""
        if any(row.tokens is not None and row.tokens.causal for row in self.rows):
            labels = labels.clone()
            starts = self._tensor([[min(row.start, self.length - 1)] for row in self.rows])
            labels.scatter_(1, starts, IGNORED)
        return self._taken(labels, trained=IGNORED, padding=IGNORED)

    def types(self, types: Tensor) -> Tensor:
        """A token's type, which virtual tokens have from their neighbour."""
        return types.expand(len(self.rows), -1).gather(1, self._near)

    def positions(self, given: Tensor | None) -> Tensor | None:
        """Each token's position; None where the model need not be told.

        Raises:
            RouteError: those given are not consecutive.
        """
        places = torch.arange(self.longer, device=self._device)
        front = self._tensor([[each * self.left] for each in self.extra])
        if given is None:
            return (places - front).clamp(min=0) if any(self.extra) and self.left else None
        if given.dim() != 2:
            raise RouteError("virtual tokens go with positions of shape (rows, tokens) alone")
        given = given.expand(len(self.rows), -1)
        starts = self._tensor([[min(row.start, self.length - 1)] for row in self.rows])
        inside = self._tensor([[row.start, row.stop] for row in self.rows])
        columns = torch.arange(self.length, device=self._device)
        real = (columns >= inside[:, :1]) & (columns < inside[:, 1:])
        begin = given.gather(1, starts)
        if bool(((given - (begin + columns - starts)) * real).any()):
            raise RouteError(
                "position_ids are not consecutive within a row: where a row holds several texts, "
                "put their virtual tokens in beforehand, as training does"
            )
        shifted = begin + places - (front + starts)
        added = self._tensor([[each] for each in self.added])
        longer = (places >= front + starts) & (places < front + inside[:, 1:] + added)
        return torch.where(longer, shifted, given.gather(1, self._near)).to(given.dtype)


def rows_of(
    ids: Ids,
    mask: Tensor | None,
    labels: Tensor | None,
    tokens: Sequence[VirtualTokens | None],
) -> list[RowTokens]:
    """The length, padding and prompt of each row of a batch.

    The prompt ends before the first label of a causal model; without labels, with the row.

    Args:
        ids: the batch.
        mask: 0 on padding; None: there is none.
        labels: one for each token, or None.
        tokens: what each row gets.
    """
    length = ids.shape[1]
    spans = [(0, length)] * len(ids)
    if mask is not None:
        real = mask.bool().int()
        starts, ends = real.argmax(1), length - real.flip(1).argmax(1)
        spans = [
            (a, b) if some else (0, 0)
            for a, b, some in zip(starts.tolist(), ends.tolist(), real.any(1).tolist(), strict=True)
        ]
    rows = []
    for number, (start, stop) in enumerate(spans):
        own, prompt = tokens[number], stop - start
        if labels is not None and own is not None and own.causal:
            prompt = prompt_length(labels[number, start:stop].tolist())
        rows.append(RowTokens(length=length, start=start, stop=stop, prompt=prompt, tokens=own))
    return rows
