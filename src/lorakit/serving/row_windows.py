"""Attention of a step of rows of unlike lengths: each reads about as many keys as it has.

All rows end at one column, so a row's own keys are the last ones, and short rows can leave out the
columns that only long ones have. Rows that follow each other and need about as many columns are a
group. Weights are read once for all of them, as without groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import sdpa_attention
from transformers.masking_utils import sdpa_mask

from lorakit.serving import kv_slots
from lorakit.upstream.private_names import attention_name, names_attention

NAME = "lorakit_row_windows"
"""The name of this attention among those of transformers."""
REPLACED = "sdpa"
"""The attention that it computes."""
WORTH = 0.5
"""The share of all rows' columns that groups may still read: else one call for all is as fast."""


@dataclass(frozen=True)
class ColumnGroup:
    """Rows that follow each other, and the columns that they read."""

    start: int
    stop: int
    columns: int


_groups: ContextVar[Sequence[ColumnGroup]] = ContextVar("groups", default=())


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


def use_row_windows(model: PreTrainedModel, *, wanted: bool = True) -> None:
    """Have a model's attention follow the groups of a step, or compute as it did before.

    Only a model with the attention `sdpa` is changed, and outside `grouped` it computes the same.
    """
    before, after = (REPLACED, NAME) if wanted else (NAME, REPLACED)
    config = model.config
    if names_attention(config) and attention_name(config) == before:
        model.set_attn_implementation(after)


@contextmanager
def grouped(groups: Sequence[ColumnGroup]) -> Iterator[None]:
    """Have the running thread's forward passes, of one token a row, read by groups."""
    token = _groups.set(groups)
    try:
        yield
    finally:
        _groups.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; shapes and arguments are those of `sdpa_attention_forward`."""
    whole = sdpa_attention.sdpa_attention_forward
    groups = _groups.get()
    if not groups or attention_mask is None:
        return sdpa_attention.sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
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


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
