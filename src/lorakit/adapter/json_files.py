"""JSON as an adapter's files have it: read as an object, and written alike for equal content."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

TYPE_OF_FIELD = re.compile(r"(list|dict|constrained-\w+|str|bool|int)(\[.*)?")
"""What pydantic puts behind a field's name where the field may be of several types."""


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
    """A line for each of pydantic's problems with a file.

    Of a field that may be of several types there is a problem for each type: those for the type
    that the value has count, and if it has none of them they are one line.
    """
    by_key: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for problem in error.errors():
        loc = problem["loc"]
        is_type = len(loc) > 1 and TYPE_OF_FIELD.fullmatch(str(loc[1])) is not None
        by_key.setdefault((loc[0], *loc[2:]) if is_type else loc, []).append(problem)
    lines = []
    for key, problems in by_key.items():
        if any(len(other) > len(key) and other[: len(key)] == key for other in by_key):
            continue
        path = ".".join(str(part) for part in key) or "(the whole)"
        first = problems[0]
        message = " or ".join(f"{each['msg'][:1].lower()}{each['msg'][1:]}" for each in problems)
        found = "" if first["type"] == "missing" else f", found {str(first['input'])[:80]!r}"
        lines.append(f"{name}  {path}: {message}{found}")
    return lines


def to_json(content: Any) -> str:
    """JSON with sorted keys: the same text for the same content.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value has no form in JSON.
    """
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
