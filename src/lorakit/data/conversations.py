"""Conversations as data sets have them: messages, ShareGPT's turns, lists in two columns."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.fields import FieldMap, as_text, is_missing
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import CALLS, Message, MessagesRow

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
}
"""Other names of roles, as ShareGPT and its relatives have them, and chat templates' names."""
KNOWN = ("system", "user", "assistant", "tool", "developer")
"""The roles that may be written with capitals."""
TRAINED = ("weight", "train", "training", "loss")
"""The keys that say whether an assistant's turn is a target: 1 or true, 0 or false."""


def messages_row(fields: FieldMap, values: Mapping[str, Any]) -> MessagesRow:
    """The conversation of a row, in the field messages.

    Raises:
        UnusableRowError: it is none, or has a turn that cannot be used.
    """
    turns = turns_of("messages", fields.value("messages", values))
    return MessagesRow(messages=turns, tools=tools_of(fields.value("tools", values)))


def two_part_row(fields: FieldMap, values: Mapping[str, Any]) -> MessagesRow:
    """The conversation of a row whose prompt is a list of messages, and whose completion may be.

    Only the completion is trained.

    Raises:
        UnusableRowError: a turn cannot be used, or the prompt is a text in this row.
    """
    prompt = turns_of("prompt", fields.value("prompt", values))
    completion = fields.value("completion", values)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer = () if completion is None else turns_of("completion", completion)
    return MessagesRow(
        messages=(*untrained(prompt), *answer), tools=tools_of(fields.value("tools", values))
    )


def untrained(turns: Iterable[Message]) -> Iterator[Message]:
    """The same turns, of which none is a target."""
    return (replace(turn, trained=False) for turn in turns)


def has_message_lists(fields: FieldMap, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether prompts are lists of messages, in any of the rows."""
    return any(isinstance(fields.value("prompt", values), list) for values in rows)


def turns_of(name: str, value: Any) -> tuple[Message, ...]:
    """The turns of a list of messages, or of its JSON text.

    Raises:
        UnusableRowError: it is none, or has a turn that cannot be used; `name` says which it is.
    """
    value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise UnusableRowError(
            f"{name} must be a list of {{role, content}}, with one turn at least"
        )
    return tuple(_message(number, turn) for number, turn in enumerate(value, start=1))


def tools_of(value: Any) -> tuple[Any, ...]:
    """The tools of a row, which may have none.

    Raises:
        UnusableRowError: they are no list of objects.
    """
    value = _parsed(value)
    if is_missing(value) or value == "":
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UnusableRowError("tools must be a list of objects, the JSON schemas of the tools")
    return tuple(_without_nulls(tool) for tool in value)


def _parsed(value: Any) -> Any:
    """A value, or what it is the JSON text of: a cell of a table holds lists as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _message(number: int, turn: Any) -> Message:
    role_key, content_key = ("from", "value") if _is_sharegpt(turn) else ("role", "content")
    calls = isinstance(turn, dict) and any(not is_missing(turn.get(key)) for key in CALLS)
    needed = {role_key} if calls else {role_key, content_key}
    if not isinstance(turn, dict) or not needed <= turn.keys():
        found = ", ".join(turn) if isinstance(turn, dict) else repr(turn)[:40]
        raise UnusableRowError(f"message {number} must have role and content, found {found}")
    keys = {key: value for key, value in turn.items() if not is_missing(value)}
    role = _role(as_text(f"role of message {number}", keys.pop(role_key, None)))
    content = keys.pop(content_key, "" if calls else None)
    trained = _trained(number, role, keys)
    if "tool_calls" in keys:
        keys["tool_calls"] = [_call(each) for each in _list(number, keys["tool_calls"])]
    return Message(
        role=role,
        content=_content(number, content),
        keys={key: value for key, value in keys.items() if key not in TRAINED},
        trained=trained,
    )


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, dict) and {"from", "value"} <= turn.keys() and "role" not in turn


def _role(name: str) -> str:
    lower = name.lower()
    return SPEAKERS.get(lower, lower if lower in KNOWN else name)


def _content(number: int, value: Any) -> str:
    """The text of a turn; the parts of a list follow each other, as chat templates write them."""
    name = f"content of message {number}"
    if not isinstance(value, list):
        return as_text(name, value)
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in value]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise UnusableRowError(f"{name} has a part of type {kind}, where only text can be used")
    return "".join(as_text(f"a part of the {name}", part.get("text")) for part in parts)


def _trained(number: int, role: str, keys: Mapping[str, Any]) -> bool:
    """Whether a turn is a target, as its keys say; an assistant's is, where they say nothing."""
    said = {key: keys[key] for key in TRAINED if key in keys}
    wrong = [f"{key} {value!r}" for key, value in said.items() if value not in (0, 1)]
    if wrong or len({bool(value) for value in said.values()}) > 1:
        raise UnusableRowError(
            f"message {number} has {' and '.join(wrong) or ' and '.join(said)}, and a turn is"
            " trained (1, true) or not (0, false)"
        )
    if role != "assistant" and any(said.values()):
        raise UnusableRowError(
            f"message {number} has {' and '.join(said)} and is the {role}'s: only the assistant's"
            " turns can be trained"
        )
    return all(said.values())


def _list(number: int, value: Any) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UnusableRowError(f"tool_calls of message {number} must be a list of objects")
    return value


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, as chat templates want them, if they are one."""
    made = _without_nulls(call)
    owner = made["function"] if isinstance(made.get("function"), dict) else made
    arguments = _parsed(owner.get("arguments"))
    if isinstance(arguments, dict):
        owner["arguments"] = arguments
    return made


def _without_nulls(value: Any) -> Any:
    """A value without keys that are null: a table gives each object the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
