"""The pages of the docs site, gathered in a folder that mkdocs reads: `make site`.

They lie there as they lie in the repository, README.md at the top, so that a link which leads
somewhere in a checkout does so on the site too. The page of the public names is made here, of their
docstrings.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import lorakit
import rooms

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/site.css",
    "examples/*",
    "benchmarks/*.yaml",
    "benchmarks/results/*",
    "paper/tables/*.md",
    "paper/figures/*",
)
"""What is on the site, or linked from it."""


def gather(folder: Path) -> None:
    """Write all pages into a folder, in the place of what it had."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in PAGES:
        for file in filter(Path.is_file, ROOT.glob(pattern)):
            copy = folder / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    (folder / "docs" / "reference.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page of the public names, by room; mkdocstrings puts their docstrings into it."""
    return "\n\n".join(_reference()) + "\n"


def _reference() -> Iterator[str]:
    yield "# Reference"
    yield "The names of `import lorakit as lk`, by the room that they come from."
    by_room: dict[str, list[str]] = {}
    for name in lorakit.__all__:
        by_room.setdefault(_room(getattr(lorakit, name)), []).append(name)
    for room in sorted(by_room, key=rooms.READING_ORDER.index):
        yield f"## {room.capitalize()}"
        yield f"{rooms.idea(room)}."
        yield from (f"::: lorakit.{name}{_options(name)}" for name in by_room[room])


def _options(name: str) -> str:
    """What mkdocstrings leaves out of a public module: members which have an entry of their own."""
    module = getattr(lorakit, name)
    if not inspect.ismodule(module):
        return ""
    twice = [each for each in vars(module) if each in lorakit.__all__]
    hidden = ", ".join(f'"!^{each}$"' for each in ("_.*", *twice))
    return f"\n    options:\n      filters: [{hidden}]"


def _room(public: object) -> str:
    module = inspect.getmodule(public)
    assert module is not None
    return module.__name__.split(".")[1]


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
