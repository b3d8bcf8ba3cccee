"""The generated tasks, whose rows a grammar makes: places and sql."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from lorakit.data.builtin import places, sql
from lorakit.data.row_types import PromptRow
from lorakit.errors import DataError, did_you_mean


@runtime_checkable
class BuiltinTask(Protocol):
    """A module with the rows of a generated task."""

    def rows(self, split: str, *, seed: int = 0) -> tuple[PromptRow, ...]:
        """The rows of the train, validation or test split."""


BUILTIN: Mapping[str, BuiltinTask] = MappingProxyType({"places": places, "sql": sql})
"""The built-in tasks by name."""


def builtin_task(name: str) -> BuiltinTask:
    """A built-in task.

    Raises:
        DataError: none has this name.
    """
    if name not in BUILTIN:
        known = ", ".join(BUILTIN)
        raise DataError(
            f"No built-in task is called {name!r}{did_you_mean(name, BUILTIN)}."
            f" The built-in tasks are {known}."
        )
    return BUILTIN[name]
