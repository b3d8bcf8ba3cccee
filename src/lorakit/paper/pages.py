"""Pages and pictures in a folder, or on the screen; and all of a repository's, made again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from lorakit.adapter.atomic_write import read_file, write_files
from lorakit.errors import OutputError
from lorakit.paper.cell import tables
from lorakit.paper.evidence import Sources
from lorakit.paper.figure import draw, points, points_table
from lorakit.paper.markdown import markdown
from lorakit.paper.reproduction import readme_table, reproduction_page
from lorakit.paper.section7 import found_of, states_of_studies
from lorakit.paper.section7_pages import draw_similarity, study_page
from lorakit.paper.settings import PaperListConfig
from lorakit.paper.study import studies
from lorakit.paper.summary import summary

PAGES, PICTURES = Path("paper/tables"), Path("paper/figures")
"""Where the tables and the figures of a repository are, from its root."""
README = Path("README.md")
_MARKED = re.compile(r"(<!-- paper -->\n).*?(<!-- end of paper -->)", re.DOTALL)


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


def small_pages(sources: Sources) -> dict[Path, str]:
    """Every page that is made of the small twins' results, by its place in the repository.

    Raises:
        DataError: a result cannot be read.
    """
    made = {Path("docs/reproduction.md"): reproduction_page(sources)}
    for name, table in tables().items():
        if table.small is None:
            continue
        place = PAGES / f"{name}.small.md"
        if name.startswith("figure"):
            made[place] = points_table(points(name, sources.results), name)
        else:
            made[place] = markdown(summary(name, scale="small", results=sources.results))
    for name in studies():
        made[PAGES / f"{name}.small.md"] = page_of_study(name, sources.results)
    return made


def page_of_study(name: str, results: Path) -> str:
    """The page of a figure or table of section 7, which says what of it is stale or not run.

    Raises:
        DataError: a result cannot be read.
    """
    states = states_of_studies([name], PaperListConfig(results=results))
    notes = [
        f"{task}: {state.kind}{f' ({state.why})' if state.why else ''}."
        for (_, task), state in states.items()
        if state.kind != "done"
    ]
    return study_page(name, found_of(name, results), notes)


def remake(root: Path, sources: Sources) -> Iterator[Path]:
    """Write every page, README's table and the figures anew, and yield what was written.

    Args:
        root: the folder of the repository.
        sources: where the results are.

    Raises:
        DataError: a result cannot be read.
        MissingExtraError: matplotlib is not installed.
        OutputError: a file cannot be written, or README.md has no place for its table.
    """
    made = {**small_pages(sources), README: with_table(root, sources)}
    for place, text in made.items():
        write_files((root / place).parent, {place.name: text.encode()}, overwrite=True)
        yield root / place
    for name in tables():
        if name.startswith("figure"):
            yield from draw(points(name, sources.results), name, root / PICTURES)
    for name, study in studies().items():
        found = found_of(name, sources.results)
        if found and study.look == "similarity":
            yield from draw_similarity(name, found, root / PICTURES)


def with_table(root: Path, sources: Sources) -> str:
    """README.md with a fresh table between <!-- paper --> and <!-- end of paper -->.

    Raises:
        OutputError: it is not there, or has no such lines.
    """
    readme = (read_file(root, README.name) or b"").decode()
    if not _MARKED.search(readme):
        raise OutputError(
            f"{root / README} has no table of the paper: it belongs between the lines"
            " <!-- paper --> and <!-- end of paper -->"
        )
    table = readme_table(sources)
    return _MARKED.sub(lambda found: f"{found[1]}{table}\n{found[2]}", readme)
