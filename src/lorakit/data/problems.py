"""The problems of a source of data, collected and then raised as one error."""

from lorakit.errors import DataError

SHOWN = 10
"""Problems that an error lists; the others are only counted."""


class UnusableRowError(ValueError):
    """A row that cannot be used: the message says why, and the catcher adds which row it is."""


class Problems:
    """The problems of a source that were found so far."""

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
