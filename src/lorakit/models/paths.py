"""Dotted paths of modules: their ends, which contains which, and the number of a block."""

from __future__ import annotations

from collections.abc import Collection


def ends_with(path: str, end: str) -> bool:
    """Whether a dotted path ends with the whole components of another."""
    return f".{path}".endswith(f".{end}")


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
