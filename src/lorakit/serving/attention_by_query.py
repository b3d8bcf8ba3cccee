"""Attention whose bits depend on a row's own keys alone: each query is computed by itself.

Sums over keys are vectorised, so the number of keys decides in which order they are added up and
how the sum is rounded; so does the number of queries. Here each query of each row is a row of its
own, and its keys are filled up to whole vectors, the hidden ones behind its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.serving.step_attention import Attention, whole

WHOLE = 64
"""Keys are filled up to multiples of so many, which are whole vectors on any processor."""


def by_query(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of rows of one length, whose queries are those of the last of their keys.

    Args:
        module: what transformers calls it for.
        query: (rows, heads, queries, size of a head); several queries only of one row.
        key: (rows, heads, keys, size of a head).
        value: the same.
        attention_mask: not used: nothing of these rows is hidden but what comes later.
        **kwargs: what else transformers says.
    """
    queries, keys = query.shape[2], key.shape[2]
    missing = -keys % WHOLE
    key, value = (F.pad(each, (0, 0, 0, missing)) for each in (key, value))
    at = torch.arange(keys + missing, device=query.device)
    # (queries, 1, 1, keys)
    seen = (at <= at[keys - queries : keys, None])[:, None, None]
    if queries == 1:
        return whole(module, query, key, value, seen, **kwargs)
    key, value = (each.expand(queries, -1, -1, -1) for each in (key, value))
    found, _ = whole(module, query.transpose(0, 2), key, value, seen, **kwargs)
    return found.transpose(0, 1), None


def rows_by_query(lengths: Sequence[int]) -> Attention:
    """Attention of a step's rows, all of which end at the last column.

    Args:
        lengths: the tokens of each row before the step; free ones have none.
    """

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        parts, start = [], 0
        for length, equal in groupby(lengths):
            rows = slice(start, start + len(list(equal)))
            keys, values = (each[rows, :, -1 - length :] for each in (key, value))
            part, _ = by_query(module, query[rows], keys, values, None, **kwargs)
            parts.append(part)
            start = rows.stop
        return torch.cat(parts), None

    return attention
