"""Figures of an analysis: heat maps and lines, as SVG in a page, and as PNG and SVG files.

A figure is its numbers first: its table is what screen readers get, and what a page shows under the
pointer. Colours are maps of even lightness (cividis, viridis), so that they survive a printer and
colour blindness.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.adapter.atomic_write import write_files
from lorakit.errors import MissingExtraError

INK, RULE = "#0b0c0d", "#c9cacb"
"""The colours of text and of thin lines: in a page those of its light or dark theme."""
COLOURS = ("#2f7fc4", "#c9701a", "#4d9a58", "#a565b5")
"""Of a few lines, on white and on black; they also differ in dashes and markers."""
DASHES = ("-", "--", "-.", ":")
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
WIDTH_INCHES = 3.6
"""Of every figure: the width of a phone's screen, several beside each other on a wider one."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """The base class of figures: a name, a title and a note."""

    name: str
    """That of its files, and in a page its id."""
    title: str
    note: str
    """What it shows, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class HeatMap(Named):
    """Numbers by row and column, as colours."""

    row_axis: str
    column_axis: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """By row and column; None: there is none."""
    unit: str
    """What a colour stands for."""
    limits: tuple[float, float] | None = None
    """The numbers at both ends of the colours; None: 0 and the largest."""
    colours: str = "cividis"

    @property
    def table(self) -> Iterator[list[str]]:
        """A head and rows, whose first cells name them."""
        yield [f"{self.row_axis} \\ {self.column_axis}", *self.columns]
        for row, values in zip(self.rows, self.values, strict=True):
            yield [row, *map(shown, values)]


@dataclass(frozen=True, kw_only=True)
class Lines(Named):
    """Lines over numbers."""

    x_axis: str
    y_axis: str
    x: Sequence[float | int]
    lines: Mapping[str, Sequence[float | None]]
    """By name a number for each of `x`; None: there is none."""
    logarithmic: bool = False
    ordered: str | None = None
    """What the lines are numbered by, such as layer; None: a few lines of different things."""

    @property
    def table(self) -> Iterator[list[str]]:
        """A head and rows, whose first cells are numbers of x."""
        yield [self.x_axis, *self.lines]
        for number, x in enumerate(self.x):
            yield [f"{x:g}", *(shown(values[number]) for values in self.lines.values())]


Figure = HeatMap | Lines


def shown(value: float | None) -> str:
    """A number in three figures; none is a dash."""
    return "–" if value is None or value != value else f"{value:.3g}"


def plain(name: str) -> str:
    """A name as a file and an id can have it."""
    return re.sub(r"[^\w-]+", "-", name).strip("-")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure as SVG for a page, and where in it the numbers are."""

    svg: str
    limits: tuple[float, float, float, float]
    """The numbers at the left, right, bottom and top end of the axes."""


def check_plots() -> None:
    """Make sure that figures can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("a report with figures", "plots")


def drawn(figure: Figure) -> Drawn:
    """A figure for a page: its texts stay text, and ids begin with the figure's name."""
    # Imported when needed: it is optional, and slow to import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    content = io.StringIO()
    with rc_context({**_style(figure.name), "svg.fonttype": "none"}):
        # A figure of its own leaves the user's pyplot alone.
        made = Canvas(figsize=(WIDTH_INCHES, _height(figure)), layout="constrained")
        axes = made.subplots()
        axes.patch.set_gid("plot")
        _draw(figure, made, axes)
        made.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    svg = content.getvalue().partition("<svg")[2]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{figure.name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    return Drawn(svg=svg, limits=(left, right, bottom, top))


def write_figures(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG, on white; earlier files are replaced.

    Raises:
        OutputError: they cannot be written.
    """
    files: dict[str, bytes] = {}
    for figure in figures:
        files |= _files(figure.name, [[figure]])
    write_files(folder, files, overwrite=True)
    return [folder / name for name in files]


def write_panels(rows: Sequence[Sequence[Figure]], name: str, folder: Path) -> list[Path]:
    """Write several figures, in rows, as one picture: a PNG and an SVG.

    Raises:
        OutputError: they cannot be written.
    """
    files = _files(name, rows)
    write_files(folder, files, overwrite=True)
    return [folder / file for file in files]


def _files(name: str, rows: Sequence[Sequence[Figure]]) -> dict[str, bytes]:
    """A picture's two files by name; without a date the same figures give the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    columns = max(map(len, rows))
    height = sum(max(map(_height, row)) + 0.25 for row in rows)
    files: dict[str, bytes] = {}
    with rc_context(_style(name)):
        made = Canvas(figsize=(WIDTH_INCHES * columns, height), layout="constrained")
        places = made.subplots(len(rows), columns, squeeze=False)
        for row, axes in zip(rows, places, strict=True):
            for figure, one in itertools.zip_longest(row, axes):
                if figure is None:
                    one.set_axis_off()
                    continue
                _draw(figure, made, one)
                one.set_title(figure.title, fontsize=9)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            content = io.BytesIO()
            made.savefig(content, format=kind, dpi=200, metadata=metadata)
            files[f"{name}.{kind}"] = content.getvalue()
    return files


def _style(name: str) -> Any:
    return {
        "font.size": 8,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": RULE,
        "xtick.color": RULE,
        "ytick.color": RULE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": RULE,
        # Names come with adapters, and a dollar sign in one begins no formula.
        "text.parse_math": False,
        # Without a salt of its own the same figure would be another text each time.
        "svg.hashsalt": name,
    }


def _draw(figure: Figure, made: Any, axes: Any) -> None:
    if isinstance(figure, HeatMap):
        _draw_map(figure, made, axes)
    else:
        _draw_lines(figure, made, axes)
    axes.spines[["top", "right"]].set_visible(False)


def _height(figure: Figure) -> float:
    if isinstance(figure, Lines):
        return 2.7
    return min(max(1.3 + 0.11 * len(figure.rows), 2.2), 4.6)


def _draw_map(figure: HeatMap, made: Any, axes: Any) -> None:
    values = [[float("nan") if v is None else v for v in row] for row in figure.values]
    known = [v for row in figure.values for v in row if v is not None]
    low, high = figure.limits or (0.0, max(known, default=0.0) or 1.0)
    image = axes.imshow(
        values, cmap=figure.colours, vmin=low, vmax=high, aspect="auto", interpolation="none"
    )
    _name_ticks(axes.xaxis, figure.columns, most=8)
    _name_ticks(axes.yaxis, figure.rows, most=16)
    if max(map(len, figure.columns), default=0) * len(figure.columns) > 40:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set_xlabel(figure.column_axis)
    axes.set_ylabel(figure.row_axis)
    bar = made.colorbar(image, ax=axes, fraction=0.06, pad=0.03)
    bar.set_label(figure.unit)
    bar.outline.set_visible(False)


def _name_ticks(axis: Any, names: Sequence[str], *, most: int) -> None:
    """Name all rows or columns that have words for names, and of numbers as many as fit."""
    every = 1
    if all(name.isdecimal() for name in names) and len(names) > most:
        every = next(n for n in (2, 4, 5, 8, 10, 16, 20, 50, 100, 1000) if len(names) / n <= most)
    at = [n for n, name in enumerate(names) if every == 1 or int(name) % every == 0]
    axis.set_ticks(at, [names[number] for number in at])


def _draw_lines(figure: Lines, made: Any, axes: Any) -> None:
    import matplotlib
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    few = not figure.ordered or len(figure.lines) == 1
    # The ends of the map are too near to white or black for lines.
    colours = matplotlib.colormaps["cividis"]
    for number, (name, values) in enumerate(figure.lines.items()):
        pairs = [(x, y) for x, y in zip(figure.x, values, strict=True) if y is not None]
        if figure.logarithmic:
            pairs = [(x, y) for x, y in pairs if y > 0]
        look: dict[str, Any] = {"color": colours(_depth(number, figure)), "linewidth": 0.9}
        if few:
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number % len(DASHES)],
                "linewidth": 1.4,
                "label": name,
            }
        few_points = len(pairs) <= 24
        axes.plot(*zip(*pairs, strict=True), marker="o" if few_points else None, ms=2.5, **look)
    if figure.logarithmic:
        axes.set_yscale("log")
        # matplotlib's own would be formulas, which no text of a figure is read as.
        axes.yaxis.set_major_formatter(FuncFormatter(_power_of_ten))
        axes.yaxis.set_minor_formatter(_between_powers())
    axes.set_xlabel(figure.x_axis)
    axes.set_ylabel(figure.y_axis)
    axes.grid(linewidth=0.4, alpha=0.7)
    axes.set_axisbelow(True)
    if all(float(x).is_integer() for x in figure.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if few and len(figure.lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    elif not few:
        _add_key(figure, made, axes)


def _power_of_ten(value: float, _: object) -> str:
    return "10" + f"{round(math.log10(value))}".translate(SUPERSCRIPTS)


def _between_powers() -> Any:
    """Labels such as 2·10⁻¹ at the ticks between powers where matplotlib would write 2e-01."""
    from matplotlib.ticker import LogFormatter

    class Labels(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            if not super().__call__(x, pos):
                return ""
            power = 10.0 ** math.floor(math.log10(x) + 1e-9)
            return f"{round(x / power)}·{_power_of_ten(power, pos)}"

    return Labels(labelOnlyBase=False)


def _depth(number: int, figure: Lines) -> float:
    return 0.3 + 0.5 * number / max(len(figure.lines) - 1, 1)


def _add_key(figure: Lines, made: Any, axes: Any) -> None:
    """A bar of the lines' colours, with the names of the first and the last."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    names = list(figure.lines)
    ends = matplotlib.colormaps["cividis"]
    colours = [ends(_depth(number, figure)) for number in range(len(names))]
    key = ScalarMappable(cmap=LinearSegmentedColormap.from_list("lines", colours))
    bar = made.colorbar(key, ax=axes, fraction=0.06, pad=0.03, ticks=[0, 1])
    bar.ax.set_yticklabels([names[0], names[-1]])
    bar.set_label(figure.ordered)
    bar.outline.set_visible(False)
