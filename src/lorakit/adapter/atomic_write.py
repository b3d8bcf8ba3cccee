"""Writing a few files together so that they are found all old or all new, whenever the power fails.

A new folder is written under a temporary name and renamed. In a folder that exists, the files are
written into a folder inside it, which is then renamed to `PENDING`: from that moment on the new
files count. They are then moved out of it one by one. A reader looks for each file in `PENDING`
first, so it sees all the new ones, also if the moves were interrupted.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lorakit.errors import OutputError

PENDING = ".lorakit-new"
"""Name of the folder, inside an adapter's, of new files that count and are not yet moved."""


def write_files(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write files into a folder, all or none; other files in the folder stay.

    Args:
        folder: made if it does not exist; its parents too.
        files: content by name.
        overwrite: whether a folder that holds something may be written to.

    Raises:
        OutputError: the folder holds something and `overwrite` is false, or a write failed; then
            what was there before is there still.
    """
    size_bytes = sum(map(len, files.values()))
    with _explained(f"{size_bytes:,} bytes could not be written to {folder}"):
        if folder.exists():
            _refuse_occupied(folder, files, overwrite=overwrite)
            _settle(folder)
            _write_aside(folder / f"{PENDING}-{_unique()}", files, folder / PENDING)
            _settle(folder)
        else:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _write_aside(_beside(folder), files, folder)


def write_new_folder(
    folder: Path, *, fill: Callable[[Path], object], check: Callable[[Path], object]
) -> None:
    """Let a function fill a new folder, which appears whole and checked, or not at all.

    Args:
        folder: made; its parents too.
        fill: writes the files into the folder that it is given.
        check: re-reads them there, and raises an OutputError where they are not as they should be.

    Raises:
        OutputError: the folder exists, a write failed, or the check did not pass.
    """
    if folder.exists():
        raise OutputError(f"{folder} exists: choose another folder")
    with _explained(f"{folder} could not be written"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _aside(_beside(folder), folder) as aside:
            fill(aside)
            for path in aside.rglob("*"):
                _sync(path)
            check(aside)


def write_new_file(path: Path, content: bytes) -> None:
    """Write one new file, whole or not at all.

    Raises:
        OutputError: the file exists, or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} exists: choose another file")
    aside = path.with_name(f".{path.name}.{_unique()}")
    with _explained(f"{len(content):,} bytes could not be written to {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_file(aside, content)
            aside.rename(path)
        finally:
            aside.unlink(missing_ok=True)


def read_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The content of those files that a folder has, by name, as `read_file` reads them.

    Raises:
        OSError: a file cannot be read.
    """
    found = {name: read_file(folder, name) for name in names}
    return {name: data for name, data in found.items() if data is not None}


def read_file(folder: Path, name: str) -> bytes | None:
    """The content of a file of a folder, the pending one if there is one; None: it is not there.

    Raises:
        OSError: the file cannot be read.
    """
    for path in (folder / PENDING / name, folder / name):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue
    return None


def _refuse_occupied(folder: Path, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file; an adapter is written as a folder")
    if not overwrite and any(folder.iterdir()):
        raise OutputError(
            f"{folder} exists and is not empty: choose another folder, or remove it (from Python, "
            "overwrite=True replaces the adapter in it)"
        )
    taken = [name for name in files if (folder / name).is_dir()]
    if taken:
        raise OutputError(f"{folder / taken[0]} is a folder, but a file is to be written there")


def _write_aside(aside: Path, files: Mapping[str, bytes], target: Path) -> None:
    """Write files into a new folder, read them back, and rename the folder to `target`."""
    with _aside(aside, target):
        for name, content in files.items():
            _write_file(aside / name, content)


@contextmanager
def _aside(aside: Path, target: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `target` at the end; after an error it is removed."""
    try:
        aside.mkdir()
        yield aside
        _sync_folder(aside)
        aside.rename(target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _beside(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.tmp-{_unique()}"


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if path.read_bytes() != content:
        raise OSError(f"{path.name} reads back differently from what was written")


def _settle(folder: Path) -> None:
    """Move pending files into the folder, also those of an earlier process that was stopped."""
    pending = folder / PENDING
    if not pending.is_dir():
        return
    for path in sorted(pending.iterdir()):
        path.replace(folder / path.name)
    pending.rmdir()
    _sync_folder(folder)


def _sync(path: Path) -> None:
    """Write a file, or a folder's list of entries, through to the disk."""
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder can't be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _unique() -> str:
    return f"{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def _explained(failure: str) -> Iterator[None]:
    """Turn the system's errors into one that says what was to be written, and where."""
    try:
        yield
    # safetensors wraps the system's error in its own.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{failure}: {reason}; nothing that was there is lost") from error
