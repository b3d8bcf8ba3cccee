"""Keys and values of texts that were read before, from which a prompt that begins alike goes on.

They belong to weights and tokens, and are found by both: by the content of the adapters and their
weights in a combination, never by a name. What was read before a reload is not found after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor
from transformers import DynamicCache

from lorakit.serving.requests import Request, Use

SHORTEST = 8
"""Tokens of a beginning that is worth to go on from: fewer are read as fast as they are copied."""

MOST = 512
"""The most that are kept, as each is compared with each prompt."""

States = Sequence[tuple[Tensor, Tensor]]
"""Keys and values of each layer, (1, heads, tokens, size of a head)."""


class Prefixes:
    """What was read, as far as there is room for it; what was not used for the longest time goes.

    Args:
        budget_bytes: the most memory.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], States] = OrderedDict()
        self.size_bytes = 0
        """The memory that they take."""
        self.asked_tokens = 0
        """The tokens of prompts that were looked up."""
        self.found_tokens = 0
        """Those that did not have to be read again."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def has_room(self) -> bool:
        """Whether anything is kept at all."""
        return self._budget_bytes > 0

    def start(self, use: Use, prompt: Sequence[int]) -> tuple[int, DynamicCache]:
        """The longest beginning of a prompt that was read with these weights.

        At least the last token is left, whose logits nobody has kept.

        Returns:
            The number of its tokens, and a cache that has read them.
        """
        self.asked_tokens += len(prompt)
        cache = DynamicCache()
        best, count = self._longest(use, prompt)
        if best is None:
            return 0, cache
        self._kept.move_to_end(best)
        self.found_tokens += count
        for layer, (keys, values) in enumerate(self._kept[best]):
            cache.update(keys[:, :, :count], values[:, :, :count], layer)
        return count, cache

    def count(self, use: Use, prompt: Sequence[int]) -> int:
        """The tokens of the longest beginning that was read with these weights."""
        return self._longest(use, prompt)[1]

    def common(self, request: Request, earlier: Request) -> int:
        """The tokens of a request's prompt that need not be read once an earlier one is kept."""
        use = request.use
        if not (self.has_room and use.is_known and use.key == earlier.use.key):
            return 0
        count = _common(tuple(request.ids[:-1]), tuple(earlier.ids))
        return count if count >= SHORTEST else 0

    def _longest(
        self, use: Use, prompt: Sequence[int]
    ) -> tuple[tuple[str, tuple[int, ...]] | None, int]:
        wanted = tuple(prompt[:-1])
        lengths = {at: _common(at[1], wanted) for at in self._kept if at[0] == use.key}
        best = max(lengths, key=lambda at: lengths[at], default=None)
        if best is None or lengths[best] < SHORTEST:
            return None, 0
        return best, lengths[best]

    def keep(self, use: Use, tokens: Sequence[int], states: States) -> None:
        """Keep what was read; the states must not be written to from now on."""
        own = tuple(tokens)
        size = _size(states)
        if not use.is_known or len(own) < SHORTEST or size > self._budget_bytes:
            return
        for key, kept in list(self._kept):
            if key != use.key:
                continue
            if kept[: len(own)] == own:
                self._kept.move_to_end((key, kept))
                return
            if own[: len(kept)] == kept:
                self._drop((key, kept))
        self._kept[use.key, own] = states
        self.size_bytes += size
        while self.size_bytes > self._budget_bytes or len(self._kept) > MOST:
            self._drop(next(iter(self._kept)))

    def _drop(self, at: tuple[str, tuple[int, ...]]) -> None:
        self.size_bytes -= _size(self._kept.pop(at))


def _size(states: States) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in states)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginnings on."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
