"""Scoring stored outputs again, without a model, and comparing what results say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.paper.check import Data
from lorakit.paper.job import Job, jobs_of
from lorakit.paper.outputs import scores_of
from lorakit.paper.results import file_of, read_outputs, state_of
from lorakit.paper.settings import PaperVerifyConfig

TOLERANCE = 1e-9
"""How far a score that is made again may be off."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """The outcome of a verification."""

    scored: int
    """Results whose scores were made again."""
    differences: Mapping[str, str]
    """By result, what differs or is missing."""


def verify(settings: PaperVerifyConfig) -> Verified:
    """Score the outputs of every result again.

    Raises:
        LorakitError: the cells are unknown, or the data cannot be read.
    """
    data = Data(settings.data)
    found: dict[str, str] = {}
    scored = 0
    for job in jobs_of(settings, skip=True):
        try:
            state = state_of(job, settings.results, data=None)
            if state.result is None or state.result["status"] != "done":
                continue
            problems = list(_problems(job, state.result, settings.results, data))
        except LorakitError as error:
            problems = [str(error)]
        scored += 1
        if problems:
            found[job.name] = "; ".join(problems)
    return Verified(scored=scored, differences=found)


def _problems(job: Job, result: Mapping[str, Any], results: Path, data: Data) -> Iterator[str]:
    hashes = data.hashes(job)
    for name, digest in hashes.items():
        if result["data"][name]["sha256"] != digest:
            yield f"the rows ({name}) are not those of the result"
    if hashes["score"] != result["data"]["score"]["sha256"]:
        return
    outputs = read_outputs(file_of(job, results))
    if outputs.keys() != result["scores"].keys():
        yield f"outputs of {', '.join(outputs)}, scores of {', '.join(result['scores'])}"
    for name in outputs.keys() & result["scores"].keys():
        made = scores_of(job, data.scored(job), outputs[name])
        for metric, said in result["scores"][name].items():
            if not _same(made.get(metric), said):
                yield f"{name} {metric} is {made.get(metric)}, and the result says {said}"


def _same(made: float | None, said: float | None) -> bool:
    if made is None or said is None:
        return made is said
    return math.isclose(made, said, rel_tol=0, abs_tol=TOLERANCE)
