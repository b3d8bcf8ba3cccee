"""Which grammar a body asks for: the form of an answer, or of the calls in it."""

from __future__ import annotations

import json
from typing import Any

from lorakit.serving.api.bodies import Asked
from lorakit.serving.api.tool_calls import Calling
from lorakit.serving.grammars import Rule
from lorakit.serving.refusals import RefusalError


def rule_of(body: Asked, calling: Calling | None = None) -> Rule | None:
    """What the answers to a body must be; None: anything.

    Args:
        body: what was asked.
        calling: the tools that the answers may call.

    Raises:
        RefusalError: it asks for several things at once.
    """
    found = dict(_rules(body))
    if calling is not None:
        found["tools"] = calling.rule
    if len(found) > 1:
        raise RefusalError(
            f"{' and '.join(found)} each say what an answer must be: give one",
            param=list(found)[1],
        )
    return next(iter(found.values()), None)


def _rules(body: Asked) -> list[tuple[str, Rule]]:
    """Each field that says what an answer must be."""
    found: list[tuple[str, Rule]] = []
    form, outputs = body.response_format, body.structured_outputs
    if form is not None and form.type == "json_object":
        found.append(("response_format", Rule.of_schema({"type": "object"})))
    if form is not None and form.json_schema is not None:
        found.append(("response_format", Rule.of_schema(form.json_schema.schema_)))
    named: dict[str, tuple[str, Any]] = {
        "guided_json": ("json", body.guided_json),
        "guided_regex": ("regex", body.guided_regex),
        "guided_choice": ("choice", body.guided_choice),
        "guided_grammar": ("lark", body.guided_grammar),
    }
    if outputs is not None:
        any_object = {"type": "object"} if outputs.json_object else None
        named |= {
            "structured_outputs.json": ("json", outputs.json_),
            "structured_outputs.json_object": ("json", any_object),
            "structured_outputs.regex": ("regex", outputs.regex),
            "structured_outputs.choice": ("choice", outputs.choice),
            "structured_outputs.grammar": ("lark", outputs.grammar),
        }
    for field, (kind, value) in named.items():
        if value is not None:
            found.append((field, _rule(kind, value)))
    return found


def _rule(kind: str, value: Any) -> Rule:
    return Rule(kind, value if isinstance(value, str) else json.dumps(value))
