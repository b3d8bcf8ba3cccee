"""A sampler that puts samples of similar length into one batch, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

BATCHES_TO_SORT = 50
"""The number of batches whose samples are drawn at random and then sorted: enough for little
padding, few enough that an epoch stays well mixed."""


class ByLength(Sampler[int]):
    """Draws every sample once in an epoch, in an order that depends on seed and epoch alone.

    So a run that is resumed within an epoch continues with the samples that it would have had.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration has."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        rows = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool = BATCHES_TO_SORT * self._batch_size
        for start in range(0, len(rows), pool):
            # Stable, so that rows of equal length stay in random order.
            drawn = sorted(rows[start : start + pool], key=self._lengths.__getitem__)
            full = len(drawn) // self._batch_size
            # A batch that is not full can only be the last one of the epoch.
            for batch in [*torch.randperm(full, generator=generator).tolist(), full]:
                yield from drawn[batch * self._batch_size : (batch + 1) * self._batch_size]
