"""The map of the source: its rooms with what their docstrings say, and which way imports point.

`make docs` writes it into the pages, between `<!-- rooms -->` and `<!-- end of rooms -->`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorakit"
PAGES = ("README.md", "CONTRIBUTING.md", "docs/design/README.md")
BLOCK = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- end of rooms -->)", re.DOTALL)

FLOW = (
    ("cli",),
    ("paper",),
    ("bench", "analysis"),
    ("estimating",),
    ("serving",),
    ("answering",),
    ("training",),
    ("bank", "merging"),
    ("routing", "attachment"),
    ("methods",),
    ("layers",),
    ("adapter", "data"),
    ("models", "kernels"),
    ("config",),
    ("errors", "upstream"),
)
"""Which way imports point: a room may import those of its own step and of the steps behind it."""

READING_ORDER = (
    "errors",
    "config",
    "models",
    "data",
    "adapter",
    "layers",
    "methods",
    "attachment",
    "routing",
    "merging",
    "bank",
    "kernels",
    "upstream",
    "training",
    "answering",
    "analysis",
    "serving",
    "estimating",
    "bench",
    "paper",
    "cli",
)
"""The order of the map: from what everything rests on to what a user types."""


def rooms() -> list[str]:
    """The names of the rooms: the folders and the loose modules right under src/lorakit."""
    return sorted(path.stem for path in SOURCE.iterdir() if _is_room(path))


def _is_room(path: Path) -> bool:
    if path.suffix == ".py":
        return path.stem not in ("__init__", "__main__")
    return (path / "__init__.py").is_file()


def page_block() -> str:
    """The map as it stands in the pages."""
    lines = list(_lines())
    width = max(len(name) for name, _ in lines) + 2
    rows = [f"{name:<{width}}{idea}".rstrip() for name, idea in lines]
    flow = " → ".join(", ".join(step) for step in FLOW)
    return "```text\n" + "\n".join(rows) + f"\n```\n\nImports point one way: {flow}.\n"


def _lines() -> Iterator[tuple[str, str]]:
    yield "src/lorakit/", ""
    for name in READING_ORDER:
        if (SOURCE / f"{name}.py").is_file():
            yield f"  {name}.py", idea(name)
            continue
        yield f"  {name}/", idea(name)
        for inner in sorted((SOURCE / name).glob("*/__init__.py")):
            yield f"    {inner.parent.name}/", _idea(inner)


def idea(room: str) -> str:
    """What a room's docstring says it is."""
    module = SOURCE / f"{room}.py"
    return _idea(module if module.is_file() else SOURCE / room / "__init__.py")


def _idea(module: Path) -> str:
    """The first line of a module's docstring, in the middle of a sentence."""
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].removesuffix(".")


def main() -> None:
    """Write the map into every page that has it."""
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda _: page_block(), text), encoding="utf-8")


if __name__ == "__main__":
    main()
