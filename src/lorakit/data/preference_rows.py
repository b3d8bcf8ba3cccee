"""Rows of two answers to one prompt, of which one was chosen: texts, or lists of messages."""

from collections.abc import Mapping
from typing import Any

from lorakit.config.rows import RowField
from lorakit.data.conversations import tools_of, turns_of, untrained
from lorakit.data.fields import FieldMap, as_text
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import Message, MessagesRow, PreferenceRow, PromptRow

ANSWERS: tuple[RowField, ...] = ("chosen", "rejected")


def preference_row(fields: FieldMap, values: Mapping[str, Any]) -> PreferenceRow:
    """The row of two answers, which are texts, or conversations as TRL's data sets have them.

    Of conversations the prompt is a list of messages too, and the answers follow it; or there is
    none, and it is what both conversations begin with. Beside whole conversations a prompt may be
    the text of a message in them; beside answers alone it is the user's message.

    Raises:
        UnusableRowError: it is neither, or compares nothing; says why.
    """
    prompt = fields.value("prompt", values)
    chosen, rejected = (fields.value(name, values) for name in ANSWERS)
    if any(isinstance(each, list) for each in (prompt, chosen, rejected)):
        tools = tools_of(fields.value("tools", values))
        return _of_conversations(prompt, chosen, rejected, tools)
    chosen, rejected = (fields.text(name, values) for name in ANSWERS)
    if prompt is None:
        raise UnusableRowError(
            "there is no prompt, which only answers that are lists of messages may hold; say in"
            " data.fields which column it is"
        )
    if chosen == rejected:
        raise UnusableRowError("chosen and rejected are the same, so neither is preferred")
    asked = fields.text("prompt", values)
    return PreferenceRow(
        chosen=PromptRow(prompt=asked, completion=chosen),
        rejected=PromptRow(prompt=asked, completion=rejected),
    )


def _of_conversations(
    prompt: Any, chosen: Any, rejected: Any, tools: tuple[Any, ...]
) -> PreferenceRow:
    better, worse = _answer("chosen", chosen), _answer("rejected", rejected)
    if better == worse:
        raise UnusableRowError("chosen and rejected are the same, so neither is preferred")
    if isinstance(prompt, list):
        asked = turns_of("prompt", prompt)
        if all(each[: len(asked)] == asked for each in (better, worse)):
            better, worse = better[len(asked) :], worse[len(asked) :]
    else:
        shared = _shared(better, worse)
        asked = _with_text(prompt, better[:shared])
        better, worse = better[shared:], worse[shared:]
    _check_answers(asked, better, worse)
    before = tuple(untrained(asked))
    return PreferenceRow(
        chosen=MessagesRow(messages=(*before, *better), tools=tools),
        rejected=MessagesRow(messages=(*before, *worse), tools=tools),
        asked=len(before),
    )


def _answer(name: str, value: Any) -> tuple[Message, ...]:
    """The messages of an answer; a text is one of the assistant."""
    if value is None:
        raise UnusableRowError(f"there is no {name}")
    if not isinstance(value, list):
        return (Message(role="assistant", content=as_text(name, value)),)
    turns = turns_of(name, value)
    if turns[-1].role != "assistant":
        raise UnusableRowError(
            f"the last message of {name} is the {turns[-1].role}'s, and an answer is the"
            " assistant's"
        )
    return turns


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """The number of messages that two conversations begin with alike."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shortest = min(len(chosen), len(rejected))
    return next((number for number, (one, other) in pairs if one != other), shortest)


def _with_text(prompt: Any, shared: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages that two answers share, with a prompt that is a text, if there is one."""
    if prompt is None:
        return shared
    text = as_text("prompt", prompt)
    if not shared:
        return (Message(role="user", content=text),)
    if all(each.content.strip() != text.strip() for each in shared):
        raise UnusableRowError(
            f"the prompt {text!r:.40} is none of the messages that chosen and rejected begin with"
        )
    return shared


def _check_answers(
    asked: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> None:
    """Make sure that two answers follow one prompt.

    Raises:
        UnusableRowError: there is no prompt, or no answer to it.
    """
    for name, answer in zip(ANSWERS, (chosen, rejected), strict=True):
        if not answer:
            raise UnusableRowError(
                f"{name} has nothing after the {len(asked)} messages that both begin with"
            )
        if answer[0].role != "assistant":
            where = f"after {len(asked)} messages" if asked else "from the start"
            raise UnusableRowError(
                f"chosen and rejected have no prompt in common: {where} {name} has a message of the"
                f" {answer[0].role}, where the assistant's answer is needed"
            )
    if not asked:
        raise UnusableRowError("there is no prompt: both answers begin with the assistant")
