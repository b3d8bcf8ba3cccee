"""Whether an adapter and a base agree in what PEFT's LoftQ has made of the base's weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorakit.adapter.content import AdapterContent
from lorakit.errors import TargetError
from lorakit.models.base import unwrapped
from lorakit.models.loftq import loftq_of


def other_weights(model: nn.Module, adapter: AdapterContent) -> Iterator[str]:
    """Yield a line if LoftQ has changed other weights of a base than an adapter was trained on."""
    found, wanted = loftq_of(unwrapped(model)), adapter.loftq_forms
    if found == wanted:
        return
    if not found:
        yield (
            f"LoftQ ({adapter.loftq}) changed its layers of the base, and those of this one are as "
            "they were: load the base by adapter.load_base(), or call adapter.prepare_base(model); "
            "allow_other_base=True accepts that"
        )
        return
    paths = [path for path in {**found, **wanted} if found.get(path) != wanted.get(path)]
    first, unchanged = paths[0], "as it was"
    yield (
        f"LoftQ changed this base for another adapter: {len(paths)} layers are not as this one was "
        f"trained on ({first}: {found.get(first, unchanged)}; for this adapter: "
        f"{wanted.get(first, unchanged)}): load the base anew, by adapter.load_base()"
    )


def check_weights_as_they_were(model: nn.Module) -> None:
    """Refuse a fresh adapter where LoftQ has changed the base for another one.

    Raises:
        TargetError: it has.
    """
    found = loftq_of(unwrapped(model))
    if found:
        raise TargetError(
            f"LoftQ changed {len(found)} layers of this base for an adapter of PEFT's, and a fresh "
            "one is for a base as it is: load the base anew, by lk.load_model(…)"
        )
