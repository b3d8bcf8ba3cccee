"""The number of rows of a batch, compared with that of the route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakit.errors import RouteError
from lorakit.layers.route import Route


def check_batch(route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare the batch that a model is called with with the route.

    Raises:
        RouteError: the batch has another number of rows.
    """
    rows = route.top.rows
    if rows is None:
        return
    found = _batch_size(args, kwargs)
    if found in (None, rows) or (found % rows == 0 and _is_repeated(route, rows, found, kwargs)):
        return
    raise RouteError(
        f"the route is for {rows} rows, but the batch has {found} rows; beams and several answers "
        "to a row are known only where generate uses its cache"
    )


def _batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The rows of a model's first tensor."""
    named = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tensors = (x for x in (*args, *named, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
    return next((x.shape[0] for x in tensors), None)


def _is_repeated(route: Route, rows: int, found: int, kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate` made several rows of each, and not a caller who gave too many.

    Its first pass, where its cache is empty, has the same prompt in each of them.
    """
    encoded, cache = kwargs.get("encoder_outputs"), kwargs.get("past_key_values")
    if encoded is not None:
        return _has_equal_rows(encoded[0], rows)
    if cache is None:
        return False
    if cache.get_seq_length() == 0:
        ids = kwargs.get("input_ids")
        prompts = kwargs["inputs_embeds"] if ids is None else ids
        route.repeats = found // rows if _has_equal_rows(prompts, rows) else 1
    return found == rows * route.repeats


def _has_equal_rows(x: Tensor, groups: int) -> bool:
    """Whether each of so many groups of neighbours is one row several times, NaN included."""
    grouped = x.unflatten(0, (groups, -1))
    first = grouped[:, :1]
    return bool(((grouped == first) | ((grouped != grouped) & (first != first))).all())
