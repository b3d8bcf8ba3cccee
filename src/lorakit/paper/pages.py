"""Pages and pictures in a folder, or on the screen."""

from __future__ import annotations

from pathlib import Path

from lorakit.adapter.atomic_write import write_files


def written(page: str, folder: Path | None, name: str) -> str:
    """Write a page into a folder, where it replaces an earlier one, and say so.

    Without a folder it is the page itself.

    Raises:
        OutputError: it cannot be written.
    """
    if folder is None:
        return page
    write_files(folder, {name: page.encode()}, overwrite=True)
    return f"written to {folder / name}"
