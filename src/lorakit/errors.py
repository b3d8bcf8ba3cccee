"""Every error that lorakit raises for something a user can mend.

    LorakitError
    ├── ConfigError        a setting is wrong, unknown or contradicts another
    ├── ModelError         a base model cannot be found or loaded
    ├── TargetError        a target names nothing in the model, or names it twice
    ├── AttachError        an adapter cannot be put into, or taken out of, this model
    ├── AdapterFileError   an adapter's files are missing, damaged or do not fit the model
    ├── RouteError         a route names an adapter that is not there, or has the wrong length
    ├── BankError          a bank does not know an adapter, has no room for it, or cannot let it go
    ├── MergeError         a merge, unmerge or switch is not possible now
    ├── AnalysisError      an adapter has nothing to look into, or two cannot be put side by side
    ├── DataError          rows are missing, malformed or unusable
    ├── TrainingError      a run cannot start, or was stopped by a guardrail
    ├── OutputError        a result cannot be written where it was asked for
    └── MissingExtraError  an optional library is needed and not installed

Examples:
    >>> issubclass(lk.errors.TargetError, lk.LorakitError)
    True
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import TypeVar

Error = TypeVar("Error", bound="LorakitError")


class LorakitError(Exception):
    """The base class of all of lorakit's errors.

    Examples:
        >>> try:
        ...     lk.plan(model, lk.LoRAConfig(targets=["queue"]))
        ... except lk.LorakitError as error:
        ...     print(type(error).__name__)
        TargetError
    """

    @classmethod
    def listing(cls: type[Error], headline: str, problems: Sequence[str]) -> Error:
        """One error that lists every problem under a headline."""
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        return cls("\n  ".join([f"{headline} ({count}):", *problems]))


class ConfigError(LorakitError, ValueError):
    """A setting is wrong, unknown or contradicts another."""


class ModelError(LorakitError):
    """A base model cannot be found or loaded."""


class TargetError(LorakitError):
    """A target names nothing in the model, or names a layer twice."""


class AttachError(LorakitError):
    """An adapter cannot be put into, or taken out of, this model."""


class AdapterFileError(LorakitError):
    """An adapter's files are missing, damaged or do not fit the model."""


class RouteError(LorakitError):
    """A route names an adapter that is not there, or has the wrong length."""


class BankError(LorakitError):
    """A bank does not know an adapter, has no room for it, or cannot let it go."""


class MergeError(LorakitError):
    """A merge, unmerge or switch is not possible now."""


class AnalysisError(LorakitError):
    """An adapter has nothing to look into, or two cannot be put side by side."""


class DataError(LorakitError):
    """Rows are missing, malformed or unusable."""


class TrainingError(LorakitError):
    """A training run cannot start, or was stopped by a guardrail."""


class OutputError(LorakitError):
    """A result cannot be written where it was asked for."""


class MissingExtraError(LorakitError):
    """An optional library is needed and not installed."""

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs an optional library: pip install 'lorakit[{extra}]'")
        self._made_of = purpose, extra

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        """The class and arguments to unpickle it with: its text is not its argument."""
        return type(self), self._made_of


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a message, "; did you mean 'x'?", with the nearest known word; else ""."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean '{close[0]}'?" if close else ""
