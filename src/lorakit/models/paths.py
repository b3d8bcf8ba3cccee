"""Dotted paths of modules: their ends, which contains which, and the number of a block."""

from __future__ import annotations

import re
from collections.abc import Collection

import regex

SLOWEST_MATCH_S = 1.0
"""A pattern may come from a stranger's file, and some take for ever."""


def ends_with(path: str, end: str) -> bool:
    """Whether a dotted path ends with the whole components of another."""
    return f".{path}".endswith(f".{end}")


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path.

    Raises:
        re.error: it is none, or takes longer than `SLOWEST_MATCH_S`.
    """
    try:
        return regex.fullmatch(pattern, path, timeout=SLOWEST_MATCH_S) is not None
    except regex.error as error:
        raise re.error(str(error)) from error
    except TimeoutError:
        raise re.error(f"it takes more than {SLOWEST_MATCH_S:g} s to match {path!r}") from None


def is_within(path: str, modules: Collection[str]) -> bool:
    """Whether a path is one of the modules or inside one; "" is the whole model."""
    return any(not module or f"{path}.".startswith(f"{module}.") for module in modules)


def outermost(paths: Collection[str]) -> tuple[str, ...]:
    """The paths that are inside none of the others, each once."""
    known = set(paths)

    def is_inner(path: str) -> bool:
        names = path.split(".")
        return any(".".join(names[:end]) in known for end in range(len(names)) if path)

    return tuple(path for path in dict.fromkeys(paths) if not is_inner(path))


def block_number(path: str) -> int | None:
    """The number of the block that a path is in: its first numeric component."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)
