"""JSON as an adapter's files have it: read as an object, and written alike for equal content."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError


def read_object(data: bytes, name: str, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None where it holds none, which is added to the problems.

    Args:
        data: the whole file.
        name: what to call it in a message.
        problems: gets a line for what is wrong.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        problems.append(f"{name}  is not JSON: {error}")
        return None
    if not isinstance(content, dict):
        problems.append(f"{name}  is not a JSON object")
        return None
    return content


def file_problems(name: str, error: ValidationError) -> list[str]:
    """A line for each of pydantic's problems with a file."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        message = f"{problem['msg'][:1].lower()}{problem['msg'][1:]}"
        found = "" if problem["type"] == "missing" else f", found {str(problem['input'])[:80]!r}"
        lines.append(f"{name}  {key}: {message}{found}")
    return lines


def to_json(content: Any) -> str:
    """JSON with sorted keys: the same text for the same content.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value has no form in JSON.
    """
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
