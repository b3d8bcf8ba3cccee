"""The verbs of `lorakit paper`: the paper's cells, listed, run, shown and scored again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.cli.verbs import Result, Verb
from lorakit.errors import ConfigError, DataError
from lorakit.paper.cell import cells, tables
from lorakit.paper.evidence import Sources
from lorakit.paper.figure import draw, points, points_table
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.markdown import markdown
from lorakit.paper.pages import page_of_study, remake, written
from lorakit.paper.reproduction import readme_table, reproduction_page
from lorakit.paper.results import State, state_of
from lorakit.paper.run import run_cells
from lorakit.paper.section7 import found_of, run_studies, states_of_studies
from lorakit.paper.section7_pages import draw_similarity
from lorakit.paper.settings import (
    PaperClaimsConfig,
    PaperFigureConfig,
    PaperListConfig,
    PaperPagesConfig,
    PaperRunConfig,
    PaperTableConfig,
    PaperVerifyConfig,
)
from lorakit.paper.study import studies, studies_in
from lorakit.paper.summary import Summary, summary
from lorakit.paper.verify import verify


@dataclass
class Paper:
    """One of these verbs."""

    work: Callable[[Any], Result]

    def run(self, settings: Any) -> Result:
        """Do the verb's work."""
        return self.work(settings)


def list_cells(settings: PaperListConfig) -> Result:
    """Each run of the cells that are named, or each cell, and what there is of it."""
    names = studies_in(settings.cells or ["*"])
    others = [word for word in settings.cells if word not in studies()]
    looked = states_of_studies(names, settings)
    states = {}
    if others or not settings.cells:
        chosen = settings.model_copy(update={"cells": others})
        states = {job: state_of(job, settings.results) for job in jobs_of(chosen, skip=True)}
    lines = _lines(states) if settings.cells else _lines_of_cells(states)
    return Result(
        text="\n".join([*lines, *_lines_of_studies(looked)]),
        data={"runs": _records(states), "section7": _records_of_studies(looked)},
    )


def run(settings: PaperRunConfig) -> Result:
    """Run what has no current result."""
    if named := [word for word in settings.cells if word in studies()]:
        return _run_studies(settings, named)
    done = run_cells(settings, progress=True)
    planned = {job: f"about {seconds / 60:.0f} min" for job, seconds in done.seconds.items()}
    lines = [*_lines(done.states, planned), *done.notes]
    if planned:
        hours = sum(done.seconds.values()) / 3600
        lines.append(f"about {hours:.1f} hours on one thread of a slow machine, if run one by one")
    seconds = [done.seconds.get(job) for job in done.states]
    runs = [
        {**record, "estimated_seconds": each}
        for record, each in zip(_records(done.states), seconds, strict=True)
    ]
    return Result(text="\n".join(lines), data={"runs": runs, "notes": list(done.notes)})


def _run_studies(settings: PaperRunConfig, named: Sequence[str]) -> Result:
    """Train and look into the adapters of section 7.

    Raises:
        ConfigError: cells of tables are named beside them.
    """
    others = [word for word in settings.cells if word not in named]
    if others:
        raise ConfigError(f"{', '.join(named)} and {', '.join(others)} are run one by one")
    if settings.ray is not None:
        raise ConfigError(f"{', '.join(named)}: only cells of tables are run on a cluster")
    files = run_studies(settings, progress=True)
    states = states_of_studies(named, settings)
    text = "\n".join([*_lines_of_studies(states), *(f"written to {file}" for file in files)])
    return Result(text=text, data={"files": files, "section7": _records_of_studies(states)})


def _study(name: str, results: Path, out: Path | None) -> Result:
    """A figure or the table of section 7, printed, or written and drawn.

    Raises:
        DataError: there is nothing yet.
    """
    found = found_of(name, results)
    if not found:
        folder = results / f"{name}.small"
        raise DataError(f"there is no result in {folder}: `lorakit paper run {name}` makes it")
    text = written(page_of_study(name, results), out, f"{name}.small.md")
    if out is not None and studies()[name].look == "similarity":
        drawn = draw_similarity(name, found, out)
        text = "\n".join([text, *(f"written to {file}" for file in drawn)])
    return Result(text=text, data={"name": name, "found": found})


def table(settings: PaperTableConfig) -> Result:
    """A table, printed or written."""
    if (study := f"table{settings.table.removeprefix('table')}") in studies():
        return _study(study, settings.results, settings.out)
    found = summary(_name("table", settings.table), scale=settings.scale, results=settings.results)
    page = markdown(found)
    return Result(
        text=written(page, settings.out, f"{found.name}.{found.scale}.md"), data=_data(found)
    )


def figure(settings: PaperFigureConfig) -> Result:
    """A figure's points, or the figure drawn."""
    if (study := f"figure{settings.figure.removeprefix('figure')}") in studies():
        return _study(study, settings.results, settings.out)
    name = _name("figure", settings.figure)
    found = points(name, settings.results)
    text = points_table(found, name)
    if settings.out is not None:
        text = "\n".join(f"written to {file}" for file in draw(found, name, settings.out))
    return Result(text=text, data={"figure": name, "points": [asdict(point) for point in found]})


def claims(settings: PaperClaimsConfig) -> Result:
    """The page of claims, or README's table."""
    sources = Sources(settings.results, settings.benchmarks)
    if settings.part == "readme":
        page = readme_table(sources)
        return Result(text=page, data={"page": page})
    page = reproduction_page(sources)
    return Result(text=written(page, settings.out, "reproduction.md"), data={"page": page})


def pages(settings: PaperPagesConfig) -> Result:
    """All pages of a repository, made again."""
    files = list(remake(settings.root, Sources(settings.results, settings.benchmarks)))
    lines = [f"written to {file}" for file in files]
    return Result(text="\n".join(lines), data={"files": [str(file) for file in files]})


def verify_cells(settings: PaperVerifyConfig) -> Result:
    """Score stored outputs again."""
    found = verify(settings)
    if found.differences:
        lines = [f"{name}: {what}" for name, what in found.differences.items()]
        raise DataError.listing(f"of {found.scored} results these are not as they say", lines)
    return Result(
        text=f"{found.scored} results: their outputs give the scores that they say",
        data={"scored": found.scored, "differences": {}},
    )


def _name(kind: str, number: str) -> str:
    """The folder of a table's cells.

    Raises:
        ConfigError: there is none.
    """
    name = f"{kind}{number.removeprefix(kind)}"
    if name not in tables():
        names = [one for one in [*tables(), *studies()] if one.startswith(kind)]
        known = ", ".join(one.removeprefix(kind) for one in names)
        raise ConfigError(f"there is no {kind} {number!r}; there are {known}")
    return name


def _data(found: Summary) -> dict[str, Any]:
    rows = [
        {
            "cell": line.cell.id,
            "search": line.search,
            "column": name,
            "ours": entry.ours,
            "paper": entry.paper,
            "scores": entry.scores,
            "state": entry.state,
        }
        for line in found.lines
        for name, entry in line.entries.items()
    ]
    return {"table": found.name, "scale": found.scale, "rows": rows}


def _lines_of_cells(states: Mapping[Job, State]) -> Iterable[str]:
    """A line for each cell: its method, and how many of its runs are done, stale and so on."""
    width = max(map(len, cells()))
    wide = max(len(cell.method) for cell in cells().values())
    for name, cell in cells().items():
        kinds = Counter(state.kind for job, state in states.items() if job.cell is cell)
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        yield f"{name:{width}}  {cell.method:{wide}}  {told or 'cannot be run at this scale'}"


def _lines(states: Mapping[Job, State], planned: Mapping[Job, str] | None = None) -> Iterable[str]:
    """A line for each job: what there is of it, and what a run of it would take."""
    width = max((len(job.name) for job in states), default=0)
    for job, state in states.items():
        told = [_told(job, state) if state.kind == "done" else state.why]
        told += [planned[job]] if planned and job in planned else []
        yield f"{job.name:{width}}  {state.kind:8}{', '.join(filter(None, told))}".rstrip()


def _lines_of_studies(states: Mapping[tuple[str, str], State]) -> Iterable[str]:
    """A line for each figure or table of section 7 and task."""
    for (name, task), state in states.items():
        yield f"{name}  {studies()[name].title}, {task}: {state.kind} {state.why}".rstrip()


def _records_of_studies(states: Mapping[tuple[str, str], State]) -> list[dict[str, Any]]:
    return [
        {"study": name, "task": task, "state": state.kind, "why": state.why}
        for (name, task), state in states.items()
    ]


def _told(job: Job, state: State) -> str:
    """The scores that are columns of the job's table, in its unit."""
    assert state.result is not None
    scores = state.result["scores"][job.scoring.epoch]
    columns = tables()[job.cell.table].columns.values()
    return "  ".join(
        f"{column.title} {column.shown(scores[column.score])}"
        for column in columns
        if column.task == job.task and column.score
    )


def _records(states: Mapping[Job, State]) -> list[dict[str, Any]]:
    return [
        {
            "cell": job.cell.id,
            "scale": job.scale,
            "model": job.model,
            "task": job.task,
            "seed": job.seed,
            "state": state.kind,
            "why": state.why,
            "scores": state.result.get("scores") if state.result else None,
        }
        for job, state in states.items()
    ]


SECOND_WORDS: dict[str, Verb] = {
    "list": Paper(list_cells),
    "run": Paper(run),
    "figure": Paper(figure),
    "claims": Paper(claims),
    "pages": Paper(pages),
    "table": Paper(table),
    "verify": Paper(verify_cells),
}
"""Each of these verbs, by its second word."""
