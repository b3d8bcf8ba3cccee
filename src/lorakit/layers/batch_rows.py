"""The rows of a batch: how many a model is given, and whether a layer's input has them first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lorakit.errors import RouteError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.route import Batch, Route


def check_batch(route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Compare the batch that a model is called with with the route, and note its size.

    Raises:
        RouteError: the batch has another number of rows.
    """
    rows = route.top.rows
    if rows is None:
        return
    first = first_tensor(args, kwargs)
    found = rows if first is None else first.shape[0]
    if found != rows and not (found % rows == 0 and _is_repeated(route, rows, found, kwargs)):
        raise RouteError(
            f"the route is for {rows} rows, but the batch has {found} rows; beams and several "
            "answers to a row are known only where generate uses its cache"
        )
    route.batch = Batch(found, _has_sequences(first))


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """A model's first tensor, whose first dimension are the rows of the batch."""
    named = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tensors = (x for x in (*args, *named, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
    return next(tensors, None)


def _has_sequences(first: Tensor | None) -> bool:
    """Whether a row has several tokens."""
    return first is not None and first.dim() == 2 + first.is_floating_point() and first.shape[1] > 1


def _is_repeated(route: Route, rows: int, found: int, kwargs: Mapping[str, Any]) -> bool:
    """Whether `generate` made several rows of each, and not a caller who gave too many.

    Its first pass, where its cache is empty, has the same prompt in each of them.
    """
    encoded, cache = kwargs.get("encoder_outputs"), kwargs.get("past_key_values")
    if encoded is not None:
        return _has_equal_rows(encoded[0], rows)
    if cache is None:
        return False
    if not has_tokens(cache):
        ids = kwargs.get("input_ids")
        prompts = kwargs["inputs_embeds"] if ids is None else ids
        route.repeats = found // rows if _has_equal_rows(prompts, rows) else 1
    return found == rows * route.repeats


def has_tokens(cache: Any) -> bool:
    """Whether a cache of transformers is not empty."""
    try:
        return cache.get_seq_length() > 0
    except AttributeError:
        return True
    except ValueError:
        # Of states alone, without the keys of tokens.
        return bool(cache.has_previous_state())


def _has_equal_rows(x: Tensor, groups: int) -> bool:
    """Whether each of so many groups of neighbours is one row several times, NaN included."""
    grouped = x.unflatten(0, (groups, -1))
    first = grouped[:, :1]
    return bool(((grouped == first) | ((grouped != grouped) & (first != first))).all())


def check_rows_first(layer: AdaptedLayer, x: Tensor, rows: int) -> None:
    """Refuse a layer's input whose first dimension are not the rows of the batch.

    An input in which tokens might be first, since there are as many, is noted: the end of the
    model's call finds out (`attachment/effects.py`).

    Args:
        layer: the layer.
        x: its first input.
        rows: those of the route.

    Raises:
        RouteError: the first dimension has another size, or holds tokens.
    """
    shape = x.shape
    first, leading = shape[0], len(shape) - x.is_floating_point()
    if first == rows and leading > 1 and shape[1] != rows:
        return
    route = layer.adapter_route
    batch = route.batch or Batch(rows, False)
    if layer.adapter_pieces and first % rows == 0:
        return
    if first not in (rows, batch.rows):
        raise RouteError(_other_size(layer, first, rows))
    if leading == 1 and batch.has_sequences and not _is_summary(layer, x):
        raise RouteError(
            f"the rows cannot differ: {layer.adapter_path} is given single tokens, which do not "
            "say whose they are; route the whole batch to one adapter, or leave the layer out"
        )
    if leading > 1 and shape[1] == first:
        route.unsure.add(layer.adapter_number)


def _is_summary(layer: AdaptedLayer, x: Tensor) -> bool:
    """Whether a layer without a dimension of tokens is one for whole rows, as poolers and heads."""
    return x.is_floating_point() and not layer.adapter_listed


def _other_size(layer: AdaptedLayer, found: int, rows: int) -> str:
    if found == 1:
        return (
            f"the route is for {rows} rows, but {layer.adapter_path} was given 1: an "
            "input all rows share cannot differ between them"
        )
    return (
        f"the route is for {rows} rows, but the batch has {found} at {layer.adapter_path}: other "
        "rows, or tokens, windows or images, which are no rows; route the whole batch to one "
        "adapter, or leave the layer out"
    )
