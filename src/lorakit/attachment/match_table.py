"""The match table: what an adapter is on a model, as text, one line for layers that are alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from lorakit.methods.component import Component
from lorakit.models.paths import block_number

HEAD = ("role", "shape", "layers", "rank", "scale", "parameters", "module")

MatchRow = tuple[str, ...]


def match_table(components: Iterable[Component], *, full: bool) -> str:
    """The table of an adapter's components.

    Args:
        components: in the order of their lines.
        full: give each a line of its own. Else those share one that differ in the numbers of their
            path alone.
    """
    groups: dict[object, list[Component]] = {}
    for each in components:
        path, *others = each.row
        key = path if full else path_pattern(path)
        groups.setdefault((key, *others), []).append(each)
    rows = [HEAD, *map(_row, groups.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def left_out_lines(routers: Iterable[str]) -> Iterator[str]:
    """Yield a line for each kind of router that `all-linear` leaves out.

    Args:
        routers: their paths.
    """
    for path, count in Counter(map(path_pattern, routers)).items():
        times = f" ({count} times)" if count > 1 else ""
        yield f"all-linear leaves a router out, which its name adapts: {path}{times}"


def _row(alike: Sequence[Component]) -> MatchRow:
    path, role, shape, rank, scale = alike[0].row
    paths = [each.row[0] for each in alike]
    parameters = f"{sum(each.parameters for each in alike):,}"
    module = path if len(paths) == 1 else path_pattern(path)
    return role, shape, _layers(paths), rank, scale, parameters, module


def path_pattern(path: str) -> str:
    """A path with stars for the numbers of blocks and of experts."""
    return re.sub(r"\b(expert_)?\d+\b", r"\1*", path)


def _layers(paths: Sequence[str]) -> str:
    """The numbers of the blocks that paths are in, and how many paths there are if not as many."""
    numbers = sorted({number for path in paths if (number := block_number(path)) is not None})
    text = _ranges(numbers)
    return text if len(paths) == max(len(numbers), 1) else f"{text} ({len(paths)} times)".lstrip()


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ranges, such as 0–5, 11."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in pairs)
