"""The page of what of the paper holds here: each claim with our evidence, made from results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from lorakit.config.base import Settings
from lorakit.config.strict_yaml import read_mapping
from lorakit.paper.cell import tables
from lorakit.paper.evidence import Evidence, Found, Headline, Sources
from lorakit.paper.job import jobs_of
from lorakit.paper.markdown import REASONS, heading, number
from lorakit.paper.results import State, state_of
from lorakit.paper.section7 import states_of_studies
from lorakit.paper.settings import CellChoice, PaperListConfig
from lorakit.paper.study import studies
from lorakit.paper.summary import AVERAGE

FILE = Path(__file__).parent / "claims.yaml"
Verdict = Literal["holds", "holds in part", "does not hold here", "not measured yet"]

INTRODUCTION = """\
# What of the paper holds here

Each claim of the LoRA paper (Hu et al., 2021) and our evidence for it, on packaged models that are
a hundredth to a thousandth of the paper's, for fewer steps: so what is compared is which method is
better, not the scores. A claim holds where every comparison does, and in part where some do. This
page is made from the results in `paper/results/` and `benchmarks/results/` by `lorakit paper
pages`; a test makes it again. [How cells are run](design/paper.md)."""


class Claim(Settings):
    """A claim of the paper, and what shows it or not."""

    claim: str
    """One sentence."""
    where: str
    """Where the paper makes it."""
    evidence: tuple[Evidence, ...]


class Claims(Settings):
    """The file of claims."""

    claims: tuple[Claim, ...]
    headlines: tuple[Headline, ...]
    """The numbers of README's table."""


@cache
def claims() -> Claims:
    """The claims, as `claims.yaml` has them."""
    return Claims(**read_mapping(FILE))


def reproduction_page(sources: Sources) -> str:
    """The whole page.

    Raises:
        DataError: a result cannot be read.
    """
    found = {
        claim: [each for piece in claim.evidence for each in piece.found(sources)]
        for claim in claims().claims
    }
    rows = [[claim.claim, claim.where, f"**{verdict(of)}**"] for claim, of in found.items()]
    parts = [INTRODUCTION, _grid_of_text(["claim", "in the paper", "here"], rows)]
    for claim, of in found.items():
        parts += [f"## {claim.claim.rstrip('.')}", *_paragraphs(of)]
    parts += ["## What is measured", _progress(sources.results)]
    return "\n\n".join(parts) + "\n"


def verdict(found: Sequence[Found]) -> Verdict:
    """What comparisons say together; what is not measured does not count while something is."""
    known = [each.holds for each in found if each.holds is not None]
    if not known:
        return "not measured yet"
    if all(known):
        return "holds"
    return "holds in part" if any(known) else "does not hold here"


def _paragraphs(found: Sequence[Found]) -> Iterator[str]:
    known = [each for each in found if each.holds is not None]
    missing = len(found) - len(known)
    if known:
        holds = sum(bool(each.holds) for each in known)
        yield f"{verdict(found).capitalize()}: {holds} of {len(known)} comparisons."
        yield "\n".join(f"- {'yes' if each.holds else 'no'}: {each.text}" for each in known)
    if missing:
        yield f"Comparisons that are not measured yet: {missing}."


def _grid_of_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _progress(results: Path) -> str:
    """How many runs of each table's small twins have a current result."""
    rows = []
    for name in tables():
        jobs = jobs_of(CellChoice(cells=(name,)), skip=True)
        if jobs:
            states = [state_of(job, results) for job in jobs]
            rows.append([heading(name), tables()[name].title, *_counted(states)])
    for name, study in studies().items():
        looked = states_of_studies([name], PaperListConfig(results=results))
        rows.append([heading(name), study.title, *_counted(looked.values())])
    return _grid_of_text(["table", "", "done", "stale", "failed", "not run"], rows)


def _counted(states: Iterable[State]) -> list[str]:
    kinds = Counter(state.kind for state in states)
    return [str(kinds["done"]), str(kinds["stale"]), str(kinds["failed"]), str(kinds["not run"])]


def readme_table(sources: Sources) -> str:
    """README's table: some numbers of the paper, ours beside them, and why they differ."""
    rows = []
    for each in claims().headlines:
        line, values = sources.line(each.cell), each.values(sources)
        if values["ours"] is None:
            continue
        table = tables()[line.cell.table]
        mean = f"mean of {len(line.entries)} tasks"
        title = mean if each.column == AVERAGE else table.columns[each.column].title
        digits = 1 if each.column == AVERAGE else table.columns[each.column].digits
        state = each.state(sources)
        reasons = table.small.reasons if table.small else ()
        rows.append(
            [
                f"{heading(line.cell.table)}, {line.cell.method}, {title}",
                number(values["paper"], digits),
                number(values["ours"], digits) + (f" ({state})" if state else ""),
                "; ".join(REASONS[reason] for reason in reasons),
            ]
        )
    if not rows:
        return "Not run yet."
    return _grid_of_text(["", "paper", "ours (small)", "why different"], rows)
