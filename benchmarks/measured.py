"""Where the results of these programs go, and what each says of where it was measured."""

import json
from pathlib import Path
from typing import Any

from lorakit.bench.environment import environment

__all__ = ["environment", "write_result"]

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result to benchmarks/results/NAME.json, and return the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file
