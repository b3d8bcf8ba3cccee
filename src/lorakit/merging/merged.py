"""An adapter merged into the weights for a block of work, after which they are as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.attachment.state import attachment_of, require_attachment
from lorakit.merging.merge import merge, unmerge
from lorakit.merging.report import MergeReport


@contextmanager
def merged(
    model: nn.Module,
    name: str | None = None,
    *,
    probe: Mapping[str, Tensor] | None = None,
    round_to: torch.dtype | None = None,
    original_weights: Literal["copy", "checkpoint"] = "copy",
    measure: bool = True,
) -> Iterator[MergeReport]:
    """Merge an adapter for a block of work.

    Afterwards the weights have the bits that they had before, and the adapter that was in use is in
    use again, also after an error and when nested: where another adapter was merged, it is merged
    again.

    Args:
        model: a model with adapters.
        name: which adapter; None: the active one.
        probe: as `merge` takes it, and so are all further arguments.
        round_to: a precision to round to.
        original_weights: where to keep them.
        measure: compute what rounding cost.

    Yields:
        The merge report.

    Raises:
        MergeError: as `merge` does.

    Examples:
        >>> with lk.attached(model, "out/places"), lk.merged(model) as report:
        ...     answers = lk.generate("The sea is", model=model, tokenizer=tokenizer)
    """
    state = require_attachment(model)
    active, before, rounded_to = state.route.bottom.name, state.route.merged, state.rounded_to
    report = merge(
        model,
        name,
        probe=probe,
        round_to=round_to,
        original_weights=original_weights,
        measure=measure,
    )
    try:
        yield report
    finally:
        _restore(model, active, before, rounded_to)


def _restore(
    model: nn.Module, active: str | None, merged_before: str | None, rounded_to: torch.dtype | None
) -> None:
    """Have the adapter merged that was, or none, and that one in use that was, if it is there."""
    state = attachment_of(model)
    if state is None:
        return
    if merged_before is not None and merged_before in state.adapters:
        if (state.route.merged, state.rounded_to) != (merged_before, rounded_to):
            if state.route.merged == merged_before:
                unmerge(model)
            merge(model, merged_before, round_to=rounded_to, measure=False)
        return
    if state.route.merged is not None:
        unmerge(model)
    state.activate(active if active in state.adapters else None)
