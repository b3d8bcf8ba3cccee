"""A module's class is replaced by a subclass: the object, its parameters and its hooks stay."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


class SwappedModule(nn.Module):
    """Mixed into a module's own class; the base of what is mixed in."""

    own_class: type[nn.Module]
    """The class that the module had before."""
    prefix: str
    """The beginning of the made class's name."""


_MADE: dict[tuple[object, ...], type[nn.Module]] = {}


def swapped_class(
    mixin: type[SwappedModule], own: type[nn.Module], *members: tuple[str, Any]
) -> type[nn.Module]:
    """The subclass of a module's class with something mixed in; made once for each of a kind.

    Args:
        mixin: the class that comes first.
        own: the module's class.
        members: names and values of further attributes of the class.
    """
    key = (mixin, own, *members)
    if key not in _MADE:
        name = f"{mixin.prefix}{own.__name__}"
        _MADE[key] = type(name, (mixin, own), {"own_class": own, **dict(members)})
    return _MADE[key]


def swap_back(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = cast(SwappedModule, module).own_class
