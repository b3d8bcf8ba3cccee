"""The blocks of a Transformer: their order, and the layers that write to the residual stream."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorakit.errors import TargetError
from lorakit.models.base import base_modules
from lorakit.models.families import family_name
from lorakit.models.paths import block_number
from lorakit.models.roles import targets_of

OUTPUTS = {"o": "attention output", "down": "MLP output"}
"""Roles whose output goes to the residual stream."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of a stack: attention and MLP with their norms and residuals."""

    path: str
    stack: str
    """Path of the list that it is in: an encoder's or a decoder's."""
    number: int
    """Its number in that list, from 0."""
    outputs: tuple[tuple[str, str], ...]
    """Role (`o` or `down`) and path of each layer whose output goes to the residual stream."""

    def paths(self, role: str) -> tuple[str, ...]:
        """The paths of those of its outputs that have a role."""
        return tuple(path for each, path in self.outputs if each == role)


def blocks(model: nn.Module) -> tuple[Block, ...]:
    """The blocks of all stacks, in module order.

    Raises:
        TargetError: lorakit does not know the roles of this architecture.
    """
    outputs: dict[str, list[tuple[str, str]]] = {}
    for target in targets_of(model):
        if target.role is None or target.rows is not None or block_number(target.path) is None:
            continue
        found = outputs.setdefault(_up_to_number(target.path), [])
        if target.role in OUTPUTS:
            found.append((target.role, target.path))
    if not outputs:
        name = family_name(model)
        raise TargetError(f"lorakit does not know the blocks of {name}")
    return tuple(
        Block(
            path=path,
            stack=path.rpartition(".")[0],
            number=int(path.rpartition(".")[2]),
            outputs=tuple(found),
        )
        for path, found in outputs.items()
    )


def named_modules(model: nn.Module, words: Sequence[str], *, what: str) -> tuple[str, ...]:
    """The paths of the modules that globs or re:REGEX name, in module order.

    Args:
        model: any module.
        words: a glob or re:REGEX over whole paths, or a path.
        what: the setting that they come from, for the message.

    Raises:
        TargetError: a word names no module.
    """
    paths = [path for path, _ in base_modules(model) if path]
    found = {word: [path for path in paths if _names(word, path)] for word in words}
    idle = [f"{what}: {word!r} names no module" for word, of_word in found.items() if not of_word]
    if idle:
        raise TargetError.listing("some modules cannot be found", idle)
    chosen = {path for of_word in found.values() for path in of_word}
    return tuple(path for path in paths if path in chosen)


def _names(word: str, path: str) -> bool:
    if word.startswith("re:"):
        return re.fullmatch(word.removeprefix("re:"), path) is not None
    return fnmatch.fnmatchcase(path, word)


def _up_to_number(path: str) -> str:
    """The path of the block that a path is in: up to the first number."""
    parts = path.split(".")
    end = next(at for at, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: end + 1])
