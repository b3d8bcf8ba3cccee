"""Standing keys and values of every layer over slots; all rows end at one common column.

So a batch of them is a left-padded batch, which every decoder of transformers takes. A step writes
one column in place. Rows are moved only where the column reaches the end of the buffers, or where a
row comes that is longer than the column is far.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from lorakit.errors import ModelError

SPARE = 64
"""Columns beyond the longest row, so that rows are moved once in so many steps."""

LEAST_WINDOW = 128
"""Columns of the smallest window."""


def window_for(tokens: int) -> int:
    """The columns of a window in which rows of so many tokens have room for one more.

    It is a power of two, so that the shapes of steps over windows are few.
    """
    return max(LEAST_WINDOW, 1 << tokens.bit_length())


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer; the model sees those of the step's rows and columns."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Take buffers (slots, heads, columns, size of a head)."""
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.rows, self.start, self.end = 0, 0, 0
        """The first slots that are in the step, and the columns before its own that they see."""
        self.column: Tensor | None = None
        """The step's own column, where the rows see all columns; `start` and `end` count not."""
        self.is_compileable = False
        """Whether masks are always made, also where no column is hidden."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The buffers are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the step's column, and give all that the rows see."""
        for buffer, states in zip(_buffers(self), (key_states, value_states), strict=True):
            if self.column is not None:
                buffer[: self.rows].index_copy_(2, self.column, states)
            else:
                buffer[: self.rows, :, self.end : self.end + 1] = states
        return self.seen()

    def seen(self) -> tuple[Tensor, Tensor]:
        """The keys and values that the step's rows see, its own column as the last."""
        keys, values = _buffers(self)
        columns = slice(None) if self.column is not None else slice(self.start, self.end + 1)
        return keys[: self.rows, :, columns], values[: self.rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of columns that the mask has, and the first one's number."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """The columns before the step's own, or before the last one where it is any of them."""
        if self.column is not None:
            return _buffers(self)[0].shape[2] - 1
        return self.end - self.start

    def get_max_length(self) -> int:
        """There is no limit that the model has to know."""
        return -1


class WatchedCache(Cache):
    """The layers as a step's cache, which notes those that the model writes."""

    def __init__(self, layers: Sequence[SlotLayer]) -> None:
        super().__init__(layers=list(layers))
        self.written: set[int] = set()
        """The numbers of the layers that were written; who asks has cleared it before."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that the step's rows see, its own column written."""
        self.written.add(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class KeyValueSlots:
    """The keys and values of all layers over slots.

    Args:
        count: the number of slots.
        windows: keep room for windows, so that rows are moved seldom where steps see those.
    """

    def __init__(self, count: int, *, windows: bool = False) -> None:
        self._windows = windows
        self.lengths = [0] * count
        """The tokens of each slot; 0: it is free."""
        self._spoilt: set[int] = set()
        self._layers: list[SlotLayer] = []
        self._end = 0
        self._cache: WatchedCache | None = None

    @property
    def size_bytes(self) -> int:
        """The memory of the buffers."""
        return sum(x.nbytes for layer in self._layers for x in _buffers(layer))

    @property
    def columns(self) -> int:
        """The most tokens of a row for which the buffers have room."""
        return _buffers(self._layers[0])[0].shape[2] if self._layers else 0

    def admit(self, slot: int, read: DynamicCache) -> None:
        """Copy the keys and values of one row, which was read by itself, into a slot.

        Raises:
            ModelError: the model keeps something else than keys and values.
        """
        pairs = states_of(read)
        length = pairs[0][0].shape[2]
        longest = max(length, *self.lengths)
        end = window_for(longest) - 1 if self._windows else longest
        if not self._layers:
            self._allocate(pairs, window_for(end + SPARE))
        if not any(self.lengths):
            self._end = end
        if end > min(self._end, self.columns):
            self._move(end)
        self._clear(slot)
        for layer, states in zip(self._layers, pairs, strict=True):
            for buffer, own in zip(_buffers(layer), states, strict=True):
                buffer[slot, :, self._end - length : self._end] = own[0]
        self.lengths[slot] = length

    def copied(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of a slot, (1, heads, tokens, size of a head), of each layer."""
        columns = slice(self._end - self.lengths[slot], self._end)
        return [
            (keys[slot : slot + 1, :, columns].clone(), values[slot : slot + 1, :, columns].clone())
            for keys, values in map(_buffers, self._layers)
        ]

    def free(self, slot: int) -> None:
        """Let a slot be used again; nothing is written."""
        self.lengths[slot] = 0

    def spoil(self, slot: int) -> None:
        """Have a slot be cleared before it is used again: it may hold what is no number, and
        hidden columns count nothing only as long as they do."""
        self._spoilt.add(slot)

    def _clear(self, slot: int) -> None:
        if slot in self._spoilt:
            self._spoilt.discard(slot)
            for layer in self._layers:
                for buffer in _buffers(layer):
                    buffer[slot] = 0

    def move(self, slot: int, to: int) -> None:
        """Have a free slot hold what another one does, which is free then."""
        self._clear(to)
        columns = slice(self._end - self.lengths[slot], self._end)
        for layer in self._layers:
            for buffer in _buffers(layer):
                buffer[to, :, columns] = buffer[slot, :, columns]
        self.lengths[to], self.lengths[slot] = self.lengths[slot], 0

    def make_room(self, window: int) -> None:
        """Have so many columns end with that of the next step."""
        if not window - 1 <= self._end < self.columns:
            self._move(max(window - 1, *self.lengths))

    def begin(self, rows: int, window: int | None = None) -> tuple[Cache, Tensor, list[int]]:
        """Prepare a step of the first slots.

        Args:
            rows: how many.
            window: the columns that they see, at least as many as the longest row with its new
                token has; None: as many.

        Returns:
            The cache that the model is given, the mask (rows, columns) with the step's own as the
            last, and the position of each row's token.
        """
        seen = window or 1 + max(self.lengths)
        self.make_room(seen)
        for layer in self._layers:
            layer.rows, layer.start, layer.end = rows, self._end + 1 - seen, self._end
            layer.column = None
            layer.is_compileable = window is not None
        positions = self.lengths[:rows]
        device = _buffers(self._layers[0])[0].device
        own = torch.tensor(positions, device=device)[:, None]
        # A free slot sees its own token alone: no row is without any.
        mask = (torch.arange(seen, device=device)[None] >= seen - 1 - own).long()
        return self._whole(), mask, positions

    def begin_in_place(self, rows: int, column: Tensor) -> tuple[Cache, Tensor, list[int]]:
        """Prepare a step that sees all columns of the buffers: no tensor is another one's part.

        Args:
            rows: how many.
            column: (1,), which gets the step's own.

        Returns:
            What `begin` does, the mask with all columns.
        """
        self.make_room(1 + max(self.lengths))
        column.fill_(self._end)
        for layer in self._layers:
            layer.rows, layer.column, layer.is_compileable = rows, column, True
        positions = self.lengths[:rows]
        own = torch.tensor(positions, device=column.device)[:, None]
        at = torch.arange(self.columns, device=column.device)[None]
        return self._whole(), ((at <= column) & (at >= column - own)).long(), positions

    def _whole(self) -> WatchedCache:
        if self._cache is None:
            self._cache = WatchedCache(self._layers)
        return self._cache

    def end(self) -> None:
        """Count the column that a step has written."""
        self._end += 1
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    def _allocate(self, pairs: Sequence[tuple[Tensor, Tensor]], columns: int) -> None:
        count = len(self.lengths)
        for keys, values in pairs:
            made = [x.new_zeros(count, x.shape[1], columns, x.shape[3]) for x in (keys, values)]
            self._layers.append(SlotLayer(*made))

    def _move(self, end: int) -> None:
        """Have rows end at another column, in wider buffers if there is no room behind it."""
        longest = max(self.lengths)
        columns = self.columns
        while end + SPARE > columns:
            columns *= 2
        for layer in self._layers:
            moved = []
            for buffer in _buffers(layer):
                kept = buffer[:, :, self._end - longest : self._end]
                if columns > buffer.shape[2]:
                    buffer = buffer.new_zeros(*buffer.shape[:2], columns, buffer.shape[3])
                else:
                    # The two places overlap.
                    kept = kept.clone()
                buffer[:, :, end - longest : end] = kept
                moved.append(buffer)
            layer.keys, layer.values = moved
        self._end = end


def _buffers(layer: SlotLayer) -> tuple[Tensor, Tensor]:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


def states_of(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer of a cache.

    Raises:
        ModelError: a layer has something else.
    """
    return [_states(layer) for layer in cache.layers]


def _states(layer: object) -> tuple[Tensor, Tensor]:
    """The keys and values of a layer of a cache.

    Raises:
        ModelError: it has none.
    """
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.dim() == 4):
        raise ModelError(
            "the model keeps something else than keys and values of its tokens "
            f"({type(layer).__name__}), and slots hold nothing else"
        )
    return keys, values
