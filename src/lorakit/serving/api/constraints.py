"""Which grammar a body asks for: forms of answers, and tools that must be called."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.serving.api.bodies import Asked, ChatBody, NamedTool, Tool
from lorakit.serving.grammars import SPACING, Rule
from lorakit.serving.refusals import RefusalError


def rule_of(body: Asked) -> Rule | None:
    """What the answers to a body must be; None: anything.

    Raises:
        RefusalError: it asks for several things at once, or for tools in a way that nobody knows.
    """
    found = dict(_rules(body))
    tools = forced_tools(body) if isinstance(body, ChatBody) else []
    if tools:
        found["tool_choice"] = _rule_of_tools(tools)
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


def forced_tools(body: ChatBody) -> list[Tool]:
    """The tools of which the answer must call one; none: it is text.

    Raises:
        RefusalError: the model is to decide by itself, or names a tool that there is not.
    """
    choice, tools = body.tool_choice, body.tools or []
    if choice == "none" or (choice is None and not tools):
        return []
    if choice in (None, "auto"):
        raise RefusalError(
            "tool_choice auto is not supported, since how a model writes a call by itself differs "
            'from model to model: give "required", "none", or a function\'s name',
            param="tool_choice",
        )
    if isinstance(choice, NamedTool):
        name = choice.function.name
        named = [tool for tool in tools if tool.function.name == name]
        if not named:
            known = ", ".join(tool.function.name for tool in tools) or "none"
            raise RefusalError(
                f"tool_choice names {name!r}, and the tools are: {known}", param="tool_choice"
            )
        return named[:1]
    if not tools:
        raise RefusalError("tool_choice is required, and there are no tools", param="tools")
    return list(tools)


def _rule_of_tools(tools: Sequence[Tool]) -> Rule:
    """The arguments of one tool, or the call of one of several."""
    schemas = [tool.function.parameters or {"type": "object"} for tool in tools]
    if len(tools) == 1:
        return Rule.of_schema(schemas[0])
    lines = []
    for number, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        spaced = {"x-guidance": SPACING} | schema
        opening = json.dumps(_opening(tool.function.name))
        lines.append(f'call_{number}: {opening} %json {json.dumps(spaced)} "}}"')
    starts = " | ".join(f"call_{number}" for number in range(len(tools)))
    return Rule("lark", "\n".join([f"start: {starts}", *lines]))


def _opening(name: str) -> str:
    return f'{{"name": {json.dumps(name)}, "arguments": '


@dataclass
class Call:
    """A call as it grows: the text of the answer, read as a tool's name and its arguments.

    Args:
        names: of the tools that may be called.
    """

    names: Sequence[str]
    text: str = ""
    given: int = 0
    """The characters of the arguments that were given."""

    def __post_init__(self) -> None:
        self.id = f"call_{uuid.uuid4().hex[:24]}"

    @property
    def name(self) -> str | None:
        """The tool; None: it is not known yet."""
        if len(self.names) == 1:
            return self.names[0]
        return next((name for name in self.names if self.text.startswith(_opening(name))), None)

    def arguments(self, *, over: bool) -> str:
        """The arguments so far; the brace that ends the call is none of them."""
        name = self.name
        if len(self.names) == 1 or name is None:
            return self.text if name else ""
        own = self.text.removeprefix(_opening(name))
        # What is last may be that brace.
        return own[:-1] if not over or own.endswith("}") else own

    def step(self, text: str, *, over: bool) -> list[dict[str, Any]]:
        """What is new of the call, in OpenAI's form of a stream."""
        self.text += text
        if self.name is None:
            return []
        first, arguments = self.given == 0, self.arguments(over=over)
        new, self.given = arguments[max(0, self.given - 1) :], len(arguments) + 1
        if first:
            return [{"index": 0} | self._shown(new)]
        return [{"index": 0, "function": {"arguments": new}}] if new else []

    def whole(self, text: str, *, complete: bool) -> list[dict[str, Any]]:
        """The call of an answer that is over."""
        self.text = text
        shown = self._shown(self.arguments(over=complete))
        return [shown] if self.name else []

    def _shown(self, arguments: str) -> dict[str, Any]:
        function: Mapping[str, Any] = {"name": self.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
