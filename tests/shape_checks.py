"""Checks of types and shapes at less cost: sizes are compared only where a function names any."""

import functools
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping


def spare_shapeless_functions() -> None:
    """Have jaxtyping's hook leave functions whose annotations name no shape to the type checker.

    What jaxtyping does around each call, for the sizes that its annotations share, takes longer
    than many of the functions, and without a shape there is nothing to share.
    """
    vars(jaxtyping)["jaxtyped"] = functools.partial(_checked, jaxtyping.jaxtyped)


def _checked(full: Callable[..., Any], *, typechecker: Any) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        if isinstance(function, type) or not _is_shapeless(function):
            return full(function, typechecker=typechecker)
        return typechecker(function)

    return decorate


def _is_shapeless(function: Any) -> bool:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:
        # A name that only type checkers import, or that comes later in the module.
        return False
    return not any(_has_shape(hint) for hint in hints.values())


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = typing.get_args(hint)
    return any(_has_shape(part) for part in _flat(parts))


def _flat(parts: Any) -> list[Any]:
    return [each for part in parts for each in (part if isinstance(part, list) else [part])]
