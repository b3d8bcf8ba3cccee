"""What an adapter's files claim about their sizes, compared with the files before they are read."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.adapter.atomic_write import PENDING

MOST_JSON_BYTES = 64 * 2**20
"""An adapter's settings and record; those of an adapter with 10,000 layers have 5 MB."""
MOST_HEADER_BYTES = 100 * 10**6
"""A safetensors header; the library allows no more either."""


def size_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """A line for each file of an adapter folder that is not as large as it claims, or too large.

    Only safetensors headers are read.
    """
    problems = []
    for name in names:
        places = (folder / PENDING / name, folder / name)
        path = next((place for place in places if place.is_file()), None)
        problem = None if path is None else _size_problem(path)
        problems += [] if problem is None else [f"{name} {problem}"]
    return problems


def _size_problem(path: Path) -> str | None:
    size = path.stat().st_size
    if path.suffix == ".json":
        return f"has {size:,} bytes, which is no adapter's" if size > MOST_JSON_BYTES else None
    header = header_of(path) if path.suffix == ".safetensors" else None
    if header is None:
        return None
    claimed = _first_byte(path) + _data_bytes(header)
    if claimed == size:
        return None
    return (
        f"is not a readable safetensors file: it claims {claimed:,} bytes and has {size:,}; was it "
        "cut off or damaged?"
    )


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a safetensors file: facts of each tensor by name; None: it is no such file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= MOST_HEADER_BYTES else b""
        header = json.loads(text) if text[:1] == b"{" else None
    except (OSError, ValueError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


def _first_byte(path: Path) -> int:
    """The offset of the tensors in a safetensors file, in bytes: behind its header."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _data_bytes(header: dict[str, Any]) -> int:
    """The bytes of all tensors, as a header says."""
    ends = (
        facts["data_offsets"][1]
        for name, facts in header.items()
        if name != "__metadata__" and isinstance(facts, dict) and "data_offsets" in facts
    )
    return max((end for end in ends if isinstance(end, int)), default=0)


def unpacked_problem(data: bytes) -> str | None:
    """The problem of a file of torch.save that grows when it is unpacked; None: it does not."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        # Older files are none; a damaged one is torch's to refuse.
        return None
    if unpacked <= len(data):
        return None
    return f"it would grow from {len(data):,} to {unpacked:,} bytes, and torch.save packs nothing"
