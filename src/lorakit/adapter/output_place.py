"""Whether a result can be written where it was asked for, found out before the work for it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lorakit.errors import OutputError


def check_new(path: Path) -> None:
    """Make sure that a new file or folder can be made.

    Raises:
        OutputError: something is there already, or it cannot be made.
    """
    if path.exists():
        raise OutputError(f"{path} exists: choose another name")
    check_place(path)


def check_file(path: Path) -> None:
    """Make sure that a file can be written: a new one, or in the place of an earlier one.

    Raises:
        OutputError: a folder is there, or it is below a file, or it cannot be written.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder, and a file is written: give it a name in there")
    check_place(path.parent if path.exists() else path)


def check_place(path: Path, what: str = "") -> None:
    """Make sure that a path can be made: a file or a folder within the nearest that exists.

    Args:
        path: the path; a folder that exists is fine.
        what: what is to be there, for the message where a file is in its place.

    Raises:
        OutputError: it is a file or below one, or the folder above it cannot be written.
    """
    above = path
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        found = "is a file" if above == path else f"is below the file {above}"
        raise OutputError(f"{path} {found}{what and f', and {what}'}: choose another name")
    try:
        with tempfile.TemporaryDirectory(dir=above, prefix=".lorakit-"):
            pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
