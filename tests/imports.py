"""The imports of a package as its source says them, those inside functions too."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = Mapping[str, frozenset[str]]
"""Which modules each module imports, by dotted names."""


def graph_of(package: Path) -> Graph:
    """The import graph of a package's own modules, but for imports for type checkers only."""
    files = {_dotted(file, package): file for file in sorted(package.rglob("*.py"))}
    return {name: frozenset(_known(imported(file), files)) - {name} for name, file in files.items()}


def _dotted(file: Path, package: Path) -> str:
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def _known(names: Iterator[str], files: Mapping[str, Path]) -> Iterator[str]:
    """The module that each name is, or is in."""
    for name in names:
        if name in files:
            yield name
        elif name.rpartition(".")[0] in files:
            yield name.rpartition(".")[0]


def imported(file: Path) -> Iterator[str]:
    """The dotted name of everything that a file imports."""
    yield from _imports(ast.parse(file.read_text(encoding="utf-8")))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the import from lorakit on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.expr):
            yield from _imports(node)


def circles(graph: Graph) -> list[list[str]]:
    """The groups of modules that import each other in a circle."""
    reached = {name: _reached(name, graph) for name in graph}
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in graph
        if name in reached[name]
    }
    return sorted(map(sorted, groups))


def _reached(start: str, graph: Graph) -> set[str]:
    """Every module that a module imports, directly or through others."""
    seen: set[str] = set()
    left = [start]
    while left:
        found = graph[left.pop()] - seen
        seen |= found
        left += found
    return seen
