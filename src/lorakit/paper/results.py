"""Results: one file for each cell, task and seed, its outputs beside it, and whether it is current.

    paper/results/table2.lora.small/cola/seed-0.json
    paper/results/table2.lora.small/cola/seed-0.predictions.jsonl.gz

The first has settings, data, scorer, commit, versions, hardware and scores; the second the number
of each row and what the model put out for it, never the data's texts.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.adapter.atomic_write import read_file, write_files
from lorakit.data.metrics.score import scorer
from lorakit.errors import DataError
from lorakit.paper.job import Job

FORMAT = 1
"""Of the file: a number that a change of its meaning raises."""
Outputs = Mapping[str, Sequence[Any]]
"""The answers of each evaluation (best, last) in the order of rows."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of a job, with its result if it has one."""

    kind: Literal["done", "failed", "stale", "not run"]
    why: str = ""
    """Of a stale one what differs; of a failed one the error."""
    result: Mapping[str, Any] | None = None


def file_of(job: Job, results: Path) -> Path:
    """The file of a job's result."""
    return results / job.folder / f"seed-{job.seed}.json"


def outputs_file(file: Path) -> Path:
    """The file of the outputs, beside that of the result."""
    return file.with_name(f"{file.stem}.predictions.jsonl.gz")


def state_of(job: Job, results: Path, *, data: Mapping[str, str] | None = None) -> State:
    """The state of a job: whether its result is of the present settings, data and scorer.

    Args:
        job: the job.
        results: the folder of results.
        data: the hashes of its rows by split, where the data is at hand.

    Raises:
        DataError: the file is no result, or one of another format.
    """
    found = read_result(file_of(job, results))
    if found is None:
        return State(kind="not run")
    changes = list(_changes(job, found, data))
    if changes:
        return State(kind="stale", why=", ".join(changes), result=found)
    if found["status"] != "done":
        return State(kind="failed", why=found["error"], result=found)
    return State(kind="done", result=found)


def same_run(job: Job, results: Path, data: Mapping[str, str]) -> Path | None:
    """The file of another cell's result of the same settings, rows and seed, if there is one.

    Rank 8 of W_q is a row of Table 5 and of Table 6, and is trained once.
    """
    for file in sorted(results.glob(f"*/{job.task}/seed-{job.seed}.json")):
        found = read_result(file)
        if found and found["status"] == "done" and not list(_changes(job, found, data)):
            return file
    return None


def _changes(job: Job, found: Mapping[str, Any], data: Mapping[str, str] | None) -> Iterator[str]:
    """What is no longer as it was when a result was made."""
    if found["hash"] != job.hash:
        yield f"settings ({', '.join(_differing(found['given'], job.given)) or 'model'})"
    if found["scorer"] != scorer(job.task, job.scoring.variant):
        yield "scorer"
    for split, digest in (data or {}).items():
        if found["data"][split]["sha256"] != digest:
            yield f"rows of {split}"


def _differing(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """The dotted names of settings that two nested mappings have different."""
    for name in dict.fromkeys([*then, *now]):
        old, new = then.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differing(old, new, f"{within}{name}.")
        elif old != new:
            yield f"{within}{name}"


def read_result(file: Path) -> dict[str, Any] | None:
    """A result; None: there is none.

    Raises:
        DataError: the file is something else, or a result of another format.
    """
    try:
        text = read_file(file.parent, file.name)
        found = None if text is None else json.loads(text)
        written = FORMAT if found is None else found["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is no result of `lorakit paper run`: {error!r}.") from error
    if written != FORMAT:
        raise DataError(
            f"{file} is a result of format {written}, and this version of lorakit reads {FORMAT}:"
            " move it away, and run its cell again."
        )
    return found if found is None else dict(found)


def write_result(file: Path, result: Mapping[str, Any], outputs: Outputs) -> None:
    """Write a result and its outputs, both or neither.

    Args:
        file: that of `file_of`.
        result: what is known of the run.
        outputs: of each evaluation an output for each row; none where a run failed.

    Raises:
        OutputError: a file cannot be written; what was there before is there still.
    """
    rows = zip(*outputs.values(), strict=True)
    lines = (
        json.dumps({"row": number, **dict(zip(outputs, values, strict=True))})
        for number, values in enumerate(rows)
    )
    packed = gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0)
    text = json.dumps({"format": FORMAT, **result}, indent=1)
    files = {file.name: f"{text}\n".encode(), outputs_file(file).name: packed}
    write_files(file.parent, files, overwrite=True)


def read_outputs(file: Path) -> dict[str, list[Any]]:
    """The outputs beside a result's file, of each evaluation in the order of rows.

    Raises:
        DataError: they are missing, damaged, or not those of rows 0, 1, 2 and so on.
    """
    path = outputs_file(file)
    try:
        packed = read_file(path.parent, path.name)
        if packed is None:
            raise DataError(f"{path}, the outputs of {file.name}, is missing.")
        records = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
        numbers = [record.pop("row") for record in records]
        names = list(records[0]) if records else []
        found = {name: [record[name] for record in records] for name in names}
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{path} cannot be read as outputs: {error!r}.") from error
    if numbers != list(range(len(records))):
        raise DataError(f"{path} has not the rows 0 to {len(records) - 1} in their order.")
    return found
