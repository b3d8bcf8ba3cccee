"""Attention of a step of rows of unlike lengths: each reads about as many keys as it has.

All rows end at one column, so a row's own keys are the last ones, and short rows can leave out the
columns that only long ones have. Rows that follow each other and need about as many columns are a
group. Weights are read once for all of them, as without groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lorakit.serving import kv_slots
from lorakit.serving.step_attention import Attention, whole

WORTH = 0.5
"""The share of all rows' columns that groups may still read: else one call for all is as fast."""


@dataclass(frozen=True)
class ColumnGroup:
    """Rows that follow each other, and the columns that they read."""

    start: int
    stop: int
    columns: int


def groups_of(lengths: Sequence[int]) -> list[ColumnGroup]:
    """The groups of a step's rows; none where they save too little.

    Args:
        lengths: the tokens of each row before the step.
    """
    longest = 1 + max(lengths)
    windows = [min(longest, kv_slots.window_for(length)) for length in lengths]
    if sum(windows) > WORTH * longest * len(windows):
        return []
    groups, start = [], 0
    for columns, rows in groupby(windows):
        stop = start + len(list(rows))
        groups.append(ColumnGroup(start, stop, columns))
        start = stop
    return groups


def by_groups(groups: Sequence[ColumnGroup]) -> Attention:
    """Attention of one token a row, in which each group of rows reads its own columns."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is None:
            return whole(module, query, key, value, attention_mask, **kwargs)
        # A row's distances are in its columns, so an addition to the scores has columns too.
        bias = kwargs.pop("position_bias", None)
        parts = []
        for group in groups:
            rows, last = slice(group.start, group.stop), slice(-group.columns, None)
            own = None if bias is None else bias[..., last]
            part, _ = whole(
                module,
                query[rows],
                key[rows, :, last],
                value[rows, :, last],
                attention_mask[rows, ..., last],
                position_bias=own if own is None or own.shape[0] == 1 else own[rows],
                **kwargs,
            )
            parts.append(part)
        return torch.cat(parts), None

    return attention
