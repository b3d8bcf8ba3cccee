"""A report as one HTML file that needs nothing else: styles, figures and numbers are in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from lorakit.adapter.atomic_write import write_files
from lorakit.adapter.output_place import check_file, check_place
from lorakit.analysis.figures import Figure, HeatMap, check_plots, drawn, write_figures


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """Numbers or words in rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of each names it."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is below it."""

    title: str
    text: Sequence[str] = ()
    """Paragraphs; what is between ` is set as code."""
    facts: Mapping[str, str] | None = None
    figures: Sequence[Figure] = ()
    tables: Sequence[PageTable] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    lead: str
    sections: Sequence[Section]

    @property
    def figures(self) -> list[Figure]:
        """Those of all sections."""
        return [figure for section in self.sections for figure in section.figures]

    def html(self) -> str:
        """The file's text."""
        template = Template(files("lorakit.analysis").joinpath("page.html").read_text("utf-8"))
        links = (
            f'<a href="#{_id(section.title)}">{escape(section.title)}</a>'
            for section in self.sections
        )
        return template.substitute(
            title=escape(self.title),
            lead=_words(self.lead),
            contents="\n".join(links),
            body="\n".join(map(_section, self.sections)),
        )


def check_report(*, html: Path | None, figures: Path | None) -> None:
    """Make sure that a report can be drawn and written, before the work for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OutputError: it cannot be written where it was asked for.
    """
    if html is None and figures is None:
        return
    check_plots()
    if html is not None:
        check_file(html)
    if figures is not None:
        check_place(figures, "the figures are files in a folder")


def write_page(page: Page, *, html: Path | None, figures: Path | None) -> list[Path]:
    """Write a report's file and its figures' files, as far as a place is given; the paths.

    Raises:
        OutputError: they cannot be written.
    """
    written = []
    if html is not None:
        write_files(html.parent, {html.name: page.html().encode()}, overwrite=True)
        written.append(html)
    return written + (write_figures(page.figures, figures) if figures is not None else [])


def _id(title: str) -> str:
    return "section-" + re.sub(r"\W+", "-", title.lower()).strip("-")


def _words(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _section(section: Section) -> str:
    return "\n".join(_parts(section))


def _parts(section: Section) -> Iterator[str]:
    name = _id(section.title)
    yield f'<section id="{name}" aria-labelledby="{name}-title">'
    yield f'<h2 id="{name}-title">{escape(section.title)}</h2>'
    yield from (f"<p>{_words(text)}</p>" for text in section.text)
    if section.facts:
        yield "<dl>"
        for term, fact in section.facts.items():
            yield f"<div><dt>{escape(term)}</dt><dd>{_words(fact)}</dd></div>"
        yield "</dl>"
    if section.figures:
        yield '<div class="figures">'
        yield from map(_figure, section.figures)
        yield "</div>"
    for table in section.tables:
        yield _table(table.head, table.rows, caption=table.caption)
    yield "</section>"


def _figure(figure: Figure) -> str:
    made = drawn(figure)
    data = {"kind": "lines", "limits": " ".join(f"{each:.8g}" for each in made.limits)}
    if isinstance(figure, HeatMap):
        words = f"{figure.row_axis} {{row}}, {figure.column_axis} {{column}}: {figure.unit} "
        data |= {"kind": "map", "words": words}
    else:
        data["scale"] = "log" if figure.logarithmic else "linear"
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    head, *rows = figure.table
    label = escape(f"{figure.title}. {figure.note}")
    return (
        f'<figure id="{figure.name}" {attributes}>\n<h3>{escape(figure.title)}</h3>\n'
        f"<figcaption>{_words(figure.note)}</figcaption>\n"
        f'<svg role="img" aria-label="{label}"{made.svg.strip()}\n'
        '<output aria-hidden="true"></output>\n'
        f"<details><summary>Numbers</summary>{_table(head, rows)}</details>\n</figure>"
    )


def _table(
    head: Iterable[str], rows: Iterable[Sequence[str]], *, caption: str | None = None
) -> str:
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "\n".join(map(_row, rows))
    above = f"<caption>{_words(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{above}<thead><tr>{titles}</tr></thead>'
        f"<tbody>\n{lines}\n</tbody></table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    name, *rest = cells
    return f'<tr><th scope="row">{escape(name)}</th>' + "".join(map(_cell, rest)) + "</tr>"


def _cell(text: str) -> str:
    is_number = re.fullmatch(r"[\d.,e+×%→–− -]*", text) is not None
    return f"<td>{text}</td>" if is_number else f'<td class="words">{escape(text)}</td>'
