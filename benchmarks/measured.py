"""The beginning and the end of a benchmark program: its environment, and its result file."""

import json
from pathlib import Path
from typing import Any

from lorakit.bench.environment import environment
from lorakit.bench.result import check_result
from lorakit.errors import OutputError


def begin(out: Path | None) -> dict[str, Any]:
    """The environment, taken before anything is measured.

    The program ends with a message where `out` could not be written.
    """
    try:
        check_result(out)
    except OutputError as error:
        raise SystemExit(f"error: {error}") from None
    return environment()


def write_result(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result as JSON, and print where it is; without a file do nothing."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
