"""The verb score: the scores of a file of outputs, by the official scorer of its task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorakit.cli.verbs import Result
from lorakit.config.verbs import ScoreConfig
from lorakit.data.metrics.score import score, score_names, scorer
from lorakit.errors import DataError

_JSON_TASKS = ("wikisql",)


def run(settings: ScoreConfig) -> Result:
    """Score the outputs, and name what scored them."""
    names = score_names(settings.task)
    outputs, references = _read(settings)
    scores = score(
        settings.task,
        outputs,
        references,
        variant=settings.variant,
        tables=_list(settings.tables) if settings.tables else None,
        seen=_list(settings.seen) if settings.seen else None,
        use_java=settings.scorer == "java",
    )
    made_by = scorer(settings.task, settings.variant)
    width = max(map(len, names))
    lines = [f"{name:{width}}  {value:.4f}" for name, value in scores.items()]
    return Result(
        text="\n".join([f"{len(outputs)} outputs, {made_by}", *lines]),
        data={"outputs": len(outputs), "scorer": made_by, **scores},
    )


def _read(settings: ScoreConfig) -> tuple[list[Any], list[Any]]:
    """The outputs and their references."""
    if settings.references is not None:
        outputs = _outputs(settings.outputs, as_json=settings.task in _JSON_TASKS)
        return outputs, _list(settings.references)
    records = _outputs(settings.outputs, as_json=True)
    wrong = [
        str(number)
        for number, record in enumerate(records, start=1)
        if not isinstance(record, dict) or not {"answer", "references"} <= record.keys()
    ]
    if wrong:
        raise DataError(
            f"{settings.outputs}: line {wrong[0]} has no answer with its references, as in the"
            f" outputs of evaluate ({len(wrong):,} of {len(records):,} lines): give references too"
        )
    outputs = [record.get("output", record["answer"]) for record in records]
    return outputs, [record["references"] for record in records]


def _outputs(path: Path, *, as_json: bool) -> list[Any]:
    """One output a line: a text, or where the task has queries a JSON value."""
    lines = _text(path).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    if not as_json:
        return [line.removesuffix("\r") for line in lines]
    return [_parsed(path, f"line {number}", line) for number, line in enumerate(lines, start=1)]


def _list(path: Path) -> list[Any]:
    """A JSON list."""
    value = _parsed(path, "the file", _text(path))
    if not isinstance(value, list):
        raise DataError(f"{path} must be a JSON list, one element for each output.")
    return value


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (offset {error.start}).") from error


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: {where} is no JSON: {error}.") from error
