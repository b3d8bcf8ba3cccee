"""An adapter in a model for a block of work, after which the model is as it was found."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lorakit.attachment.attach import What, attach, detach
from lorakit.attachment.plan import Plan
from lorakit.attachment.state import adapter_names, attachment_of
from lorakit.layers.route import Frame


@contextmanager
def attached(
    model: nn.Module,
    what: What,
    *,
    name: str | None = None,
    trainable: bool | None = None,
    allow_other_base: bool = False,
    data: Iterable[Mapping[str, Tensor]] | None = None,
) -> Iterator[Plan]:
    """Attach an adapter for a block of work, and make it the active one there.

    Afterwards it is detached, unmerged first if it was merged, and what was in use before is in use
    again, also after an error and when nested.

    Args:
        model: a plain module, or one with adapters.
        what: as `attach` takes it.
        name: what to call it in the block. None: any name that is free.
        trainable: whether it takes gradients. None: a fresh one does.
        allow_other_base: accept an adapter whose base has other weights.
        data: batches for LoRA's init eva.

    Yields:
        The match table.

    Raises:
        LorakitError: as `attach` does; the model is as it was.
    """
    state = attachment_of(model)
    before = Frame() if state is None else state.route.frame
    name = free_name(model, "attached") if name is None else name
    found = attach(
        model,
        what,
        name=name,
        trainable=trainable,
        allow_other_base=allow_other_base,
        data=data,
    )
    try:
        yield found
    finally:
        if name in adapter_names(model):
            detach(model, name)
        use_again(model, before)


def free_name(model: nn.Module, wanted: str) -> str:
    """A name that no adapter of a model has: the wanted one, if it is free, else with a number."""
    names = adapter_names(model)
    numbered = (f"{wanted}-{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([wanted], numbered) if name not in names)


def use_again(model: nn.Module, frame: Frame) -> None:
    """Have the layers read a frame again, or the base, where its adapter is gone."""
    state = attachment_of(model)
    if state is None:
        return
    if frame.name is not None:
        # Its adapter may have got other tensors meanwhile, which its frame has not.
        state.activate(frame.name if frame.name in state.adapters else None)
    else:
        state.route.switch(frame)
