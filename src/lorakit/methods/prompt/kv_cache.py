"""Key-value caches that hold virtual tokens, which the caller does not count.

A record of the inserted tokens is kept on the cache object. In each later call the mask is extended
and positions are shifted by it, after a check that the cache is as the latest call left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.errors import RouteError
from lorakit.methods.prompt.insert import LongerRows

NAME = "_lorakit_trained_tokens"
"""The attribute of a cache that holds the record."""


@dataclass(kw_only=True)
class CacheRecord:
    """The virtual tokens in the rows of a key-value cache, kept with the cache."""

    length: int
    """Tokens of a row as the caller counts them."""
    longer: int
    """Tokens of a row in the cache."""
    mask: Tensor | None
    """(rows, longer), 0 on padding; None: there is none."""
    added: tuple[int, ...]
    """Virtual tokens of each row."""
    extra: tuple[int, ...]
    """Padding of each row that the caller does not know of."""
    has_infix: bool
    """Whether virtual tokens stand behind prompts."""
    cached: int = 0
    """Tokens in the cache after the latest call."""

    def of_rows(self, rows: Sequence[int]) -> CacheRecord:
        """The record of a cache that holds these of its rows, in this order."""
        mask = None if self.mask is None else self.mask[list(rows)]
        added, extra = (tuple(each[row] for row in rows) for each in (self.added, self.extra))
        return replace(self, mask=mask, added=added, extra=extra)

    def keep_with(self, output: Any) -> None:
        """Keep this with the cache that a call returned, if it did."""
        cache: Any = output.get("past_key_values") if hasattr(output, "get") else None
        if hasattr(cache, "get_seq_length"):
            self.cached = int(cache.get_seq_length())
            setattr(cache, NAME, self)


def begun(rows: LongerRows, mask: Tensor | None) -> CacheRecord:
    """The record of a cache that begins with these rows.

    Args:
        rows: as the model gets them.
        mask: of the longer rows.
    """
    has_infix = any(row.tokens is not None and row.tokens.infix for row in rows.rows)
    return CacheRecord(
        length=rows.length,
        longer=rows.longer,
        mask=mask,
        added=tuple(rows.added),
        extra=tuple(rows.extra),
        has_infix=has_infix and rows.is_longer,
    )


def leave_alone(cache: Any) -> None:
    """Have calls with a cache of one row, filled or not, put no virtual tokens in: the caller does,
    by their ids, and counts them."""
    count = int(cache.get_seq_length())
    record = CacheRecord(
        length=count,
        longer=count,
        mask=None,
        added=(0,),
        extra=(0,),
        has_infix=False,
        cached=count,
    )
    setattr(cache, NAME, record)


def is_begun(cache: Any) -> bool:
    """Whether a cache holds tokens already, or is to be left alone from the start."""
    if not hasattr(cache, "get_seq_length"):
        return False
    record = record_of(cache)
    return int(cache.get_seq_length()) > 0 or (record is not None and not record.cached)


def record_of(cache: Any) -> CacheRecord | None:
    """The record of the tokens inserted into a cache, if there is one."""
    return getattr(cache, NAME, None)


def choose_rows(cache: Any, rows: Sequence[int]) -> None:
    """Have a cache hold some of its rows, in any order; a row may be there several times."""
    cache.reorder_cache(torch.tensor(rows))
    record = record_of(cache)
    if record is not None:
        setattr(cache, NAME, record.of_rows(rows))


def go_on(
    named: dict[str, Any], record: CacheRecord, *, takes_positions: bool
) -> dict[str, Any] | None:
    """The arguments of a call that goes on with a cache, for the rows that it holds.

    Args:
        named: the arguments by name.
        record: of the cache.
        takes_positions: whether the model can be told its positions.

    Returns:
        None, where they are right as they are.

    Raises:
        RouteError: the cache holds other tokens than the arguments speak of.
    """
    if record.longer == record.length:
        return None
    ids: Tensor = named["input_ids"]
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    cached = int(named["past_key_values"].get_seq_length())
    total = cached + ids.shape[1]
    _check(record, ids, mask, positions, cached)
    changed: dict[str, Any] = {}
    if mask is not None or record.mask is not None:
        changed["attention_mask"] = _longer_mask(record, ids, mask, total)
    added = torch.tensor(record.added, device=ids.device)[:, None]
    if positions is not None:
        changed["position_ids"] = positions + added.to(positions.dtype)
    elif any(record.extra) and takes_positions:
        extra = torch.tensor(record.extra, device=ids.device)[:, None]
        changed["position_ids"] = torch.arange(cached, total, device=ids.device) - extra
    return named | changed


def _check(
    record: CacheRecord, ids: Tensor, mask: Any, positions: Tensor | None, cached: int
) -> None:
    problems = []
    if len(ids) != len(record.added):
        problems.append(f"it holds {len(record.added)} rows, and {len(ids)} are given")
    if cached != record.cached:
        problems.append(f"it was cut or filled meanwhile: {cached} tokens, not {record.cached}")
    if record.has_infix and ids.shape[1] > 1:
        problems.append(
            f"{ids.shape[1]} tokens are given at once, but the trained ones stand behind the "
            "prompt that it began with: give the whole row without a cache"
        )
    seen = cached + ids.shape[1] - (record.longer - record.length)
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape[1:] != (seen,)):
        problems.append(f"the attention mask is not one of {seen} tokens to a row")
    if mask is None and record.mask is None and positions is not None:
        last = int(positions.max())
        if last != seen - 1:
            problems.append(f"the last position is {last}, not {seen - 1}")
    if problems:
        raise RouteError.listing("the cache holds virtual tokens, so this can't go on", problems)


def _longer_mask(record: CacheRecord, ids: Tensor, mask: Tensor | None, total: int) -> Tensor:
    first = record.mask
    if first is None:
        first = torch.ones(len(ids), record.longer, dtype=torch.long, device=ids.device)
    if mask is None:
        rest = first.new_ones(len(ids), total - record.longer)
    else:
        rest = mask[:, record.length :].to(first.dtype)
    return torch.cat([first, rest], 1)
