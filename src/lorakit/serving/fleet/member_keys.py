"""The keys that the servers behind a front ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import ConfigError


def read_keys(file: Path | None, urls: Sequence[str]) -> dict[str, str]:
    """The keys of a file by URL: a line has a key for all servers, or a URL and its key.

    Blank lines and those that begin with # are none.

    Args:
        file: None: no server asks for one.
        urls: of the servers.

    Raises:
        ConfigError: the file cannot be read, has no key, or lines that say something else; all of
            them are named by their numbers.
    """
    if file is None:
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"upstream_key_file: {file} cannot be read: {error}") from error
    found: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        *where, key = words
        if len(where) > 1 or not (key.isascii() and key.isprintable()):
            problems.append(f"line {number}: it is none of KEY and URL KEY, in ASCII")
        elif where and where[0] not in urls:
            problems.append(f"line {number}: {where[0]} is none of the upstream servers")
        else:
            found |= dict.fromkeys(where, key) if where else {u: found.get(u, key) for u in urls}
    if problems:
        raise ConfigError.listing(f"upstream_key_file: {file} can't be used", problems)
    if not found:
        raise ConfigError(
            f"upstream_key_file: {file} has no keys: give KEY, or a line URL KEY each"
        )
    return found
