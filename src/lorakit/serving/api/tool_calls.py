"""Tools of a request: the grammar of their calls, and calls in answers as these grow."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from lorakit.serving.api.bodies import ChatBody, NamedTool, Tool
from lorakit.serving.call_forms import CallForm
from lorakit.serving.grammars import SPACING, Rule
from lorakit.serving.refusals import RefusalError
from lorakit.serving.text import shared_end

ANY = "/(?s:.*)/"
"""Any text without special tokens, in Lark's form."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The tools that an answer may call."""

    all: Sequence[Tool]
    must: bool
    """Whether it has to call one; else it may be text."""
    several: bool
    """Whether it may call more than one."""

    @staticmethod
    def of(body: ChatBody) -> Tools | None:
        """Those of a body; None: the answer is text.

        Raises:
            RefusalError: it wants a tool called that there is not.
        """
        choice, tools = body.tool_choice, body.tools or []
        several = body.parallel_tool_calls is not False
        if isinstance(choice, NamedTool):
            return Tools(all=[_named(choice, tools)], must=True, several=False)
        if choice == "required" and not tools:
            raise RefusalError("tool_choice is required, and there are no tools", param="tools")
        if choice == "none" or not tools:
            return None
        return Tools(all=tools, must=choice == "required", several=several)


def _named(choice: NamedTool, tools: Sequence[Tool]) -> Tool:
    """The tool that a choice names.

    Raises:
        RefusalError: there is none.
    """
    name = choice.function.name
    for tool in tools:
        if tool.function.name == name:
            return tool
    known = ", ".join(tool.function.name for tool in tools) or "none"
    raise RefusalError(
        f"tool_choice names {name!r}, and the tools are: {known}", param="tool_choice"
    )


@dataclass(frozen=True, kw_only=True)
class Calling:
    """Tools that an answer may call, and the form in which it does."""

    tools: Tools
    form: CallForm

    @property
    def rule(self) -> Rule:
        """What the answer must be: a call whose arguments its schema allows, or text before it."""
        tools = self.tools.all
        calls = f"calls{' more*' if self._repeats else ''} {self._told('closing')}"
        lines = [
            *self._start(calls),
            f"calls: {' | '.join(f'call_{number}' for number in range(len(tools)))}",
            *(self._call(number, tool) for number, tool in enumerate(tools)),
        ]
        if self._repeats:
            lines.append(f"more: {self._told('between')} calls")
        return Rule("lark", "\n".join(lines))

    def _start(self, calls: str) -> list[str]:
        """The rule of the whole answer, with what it needs."""
        form, opening = self.form, self._told("opening")
        if self.tools.must:
            return [f"start: {opening} {calls}"]
        if form.trigger in form.special:
            return [f"start: TEXT | TEXT {opening} {calls}", f"TEXT: {ANY}"]
        if form.trigger:
            rest = self._lark(form.opening.removeprefix(form.trigger))
            begun = f"begun[lazy]: TEXT {_quoted(form.trigger)}"
            return [f"start: TEXT | begun {rest} {calls}", begun, f"TEXT: {ANY}"]
        # Only a text that does not begin like a call is one.
        begun = _quoted(next(form.pieces(form.opening)))
        return [f"start: TEXT | {opening} {calls}", f"TEXT: {ANY} & ~({begun} {ANY})"]

    @property
    def _repeats(self) -> bool:
        return self.tools.several and self.form.between is not None

    def _call(self, number: int, tool: Tool) -> str:
        function = tool.function
        schema = {"x-guidance": SPACING, "type": "object"} | (function.parameters or {})
        named = self._lark(function.name + self.form.middle)
        return f"call_{number}: {named} %json {json.dumps(schema)}"

    def _told(self, part: str) -> str:
        return self._lark(getattr(self.form, part))

    def _lark(self, text: str) -> str:
        """A text in Lark's form, in which special tokens have their numbers."""
        special = self.form.special
        pieces = (
            f"<[{special[piece]}]>" if piece in special else _quoted(piece)
            for piece in self.form.pieces(text)
            if piece
        )
        return " ".join(pieces)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Reading(Enum):
    """What the text that comes next belongs to."""

    CONTENT = auto()
    NAME = auto()
    ARGUMENTS = auto()
    AFTER = auto()
    """The end of a call, or what stands between it and the next."""


class CallReader:
    """An answer as it grows, read as content and calls.

    Args:
        calling: what may be called, and how.
    """

    def __init__(self, calling: Calling) -> None:
        self._form, self._must = calling.form, calling.tools.must
        self._reading = _Reading.CONTENT
        self._rest = ""
        """The text that belongs to nothing yet."""
        self._has_content = False
        self._calls = 0
        self._arguments = ""
        """Those of the latest call, as far as they were given."""

    @property
    def has_called(self) -> bool:
        """Whether a call has begun."""
        return self._calls > 0

    def step(self, text: str, *, over: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is new of the content, and of the calls in OpenAI's form of a stream."""
        self._rest += text
        content = self._content(over=over) if self._reading is _Reading.CONTENT else ""
        parts: list[dict[str, Any]] = []
        while self._go_on(parts):
            pass
        # One that has to call has written no content, but the beginning of a call.
        return "" if self._must else content, parts

    def _content(self, *, over: bool) -> str:
        """The new text before the calls; what may be the beginning of one is kept back."""
        opening, anywhere = self._form.opening, bool(self._form.trigger)
        at = self._rest.find(opening)
        if at > 0 and not anywhere:
            at = -1
        if at >= 0 and (anywhere or not self._has_content):
            content, self._rest = self._rest[:at], self._rest[at + len(opening) :]
            self._reading = _Reading.NAME
            return content
        kept = 0 if over else shared_end(self._rest, opening)
        if not anywhere and (self._has_content or kept < len(self._rest)):
            kept = 0
        cut = len(self._rest) - kept
        content, self._rest = self._rest[:cut], self._rest[cut:]
        self._has_content |= bool(content)
        return content

    def _go_on(self, parts: list[dict[str, Any]]) -> bool:
        """Take what belongs to the calls from the rest; whether more may be taken."""
        match self._reading:
            case _Reading.NAME:
                name, found, rest = self._rest.partition(self._form.middle)
                if not found:
                    return False
                self._rest, self._arguments, self._reading = rest, "", _Reading.ARGUMENTS
                parts.append({"index": self._calls, **_begun(name)})
                self._calls += 1
                return True
            case _Reading.ARGUMENTS:
                told = self._arguments + self._rest
                end = _end_of_json(told)
                new = told[len(self._arguments) : end]
                self._rest = "" if end is None else told[end:]
                self._arguments += new
                self._add(parts, new)
                self._reading = _Reading.ARGUMENTS if end is None else _Reading.AFTER
                return end is not None
            case _Reading.AFTER if self._form.between:
                if self._rest.startswith(self._form.between):
                    self._rest = self._rest.removeprefix(self._form.between)
                    self._reading = _Reading.NAME
                    return True
        return False

    def _add(self, parts: list[dict[str, Any]], arguments: str) -> None:
        """Put new arguments of the latest call into the parts."""
        if parts and parts[-1]["index"] == self._calls - 1:
            parts[-1]["function"]["arguments"] += arguments
        elif arguments:
            parts.append({"index": self._calls - 1, "function": {"arguments": arguments}})


def _begun(name: str) -> dict[str, Any]:
    call_id = f"call_{uuid.uuid4().hex[:24]}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def _end_of_json(text: str) -> int | None:
    """Where the JSON value ends with which a text begins; None: not yet."""
    try:
        return json.JSONDecoder().raw_decode(text)[1]
    except ValueError:
        return None
