"""Collects what is wrong with a source of data, so that it is told in one error."""

from lorakit.errors import DataError

SHOWN = 10
"""Problems that an error lists; the others are only counted."""


class UnusableRowError(ValueError):
    """One row lacks something; the message says what, and whoever has the row says where."""


class Problems:
    """What was found wrong with a source so far."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._shown: list[str] = []
        self._count = 0

    def add(self, where: str, what: str) -> None:
        """Note a problem, at a line or row of the source."""
        self._count += 1
        if len(self._shown) < SHOWN:
            self._shown.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        """Raise one DataError if anything was noted.

        Raises:
            DataError: lists the first problems and counts the rest.
        """
        if not self._count:
            return
        count = f"{self._count} problem" + ("s" if self._count > 1 else "")
        lines = [f"{self._source} cannot be used ({count}):", *self._shown]
        if self._count > SHOWN:
            lines.append(f"and {self._count - SHOWN} more")
        raise DataError("\n  ".join(lines))
