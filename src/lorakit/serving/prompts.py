"""What a request asks, as the tokens that the model reads: as in training, where an adapter was.

Of a combination, as all its adapters were; those whose files don't say how are asked as the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.adapter.card import TrainedUse
from lorakit.config.train import DataConfig
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row, TextRow
from lorakit.errors import DataError
from lorakit.serving.call_forms import HOW
from lorakit.serving.catalog import Chosen
from lorakit.serving.refusals import RefusalError


def text_ids(chosen: Chosen, text: str) -> list[int]:
    """The tokens of a text to go on with.

    An adapter that was trained on prompts gets what stood between prompt and answer in training,
    where the text does not end with it.

    Raises:
        RefusalError: a combination's adapters were not trained alike.
    """
    trained = _shared(chosen, _of_texts)
    if trained is not None and trained.rows_kind == "prompt":
        return encode_prompt(_prompt(trained, text), chosen.tokenizer, trained.data)
    return encode_prompt(TextRow(text=text), chosen.tokenizer, DataConfig())


def chat_ids(
    chosen: Chosen, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """The tokens of a conversation up to the assistant's next turn.

    Tools are written by the chat template, or listed in the system turn where it writes none.

    An adapter that was trained on prompts gets the one message of the user as a prompt.

    Raises:
        RefusalError: the assistant has spoken last; the adapter was trained on prompts, and this is
            more than one; or a combination's adapters were not trained alike.
        DataError: there is no chat template, or it refuses the messages.
    """
    if messages[-1].role == "assistant":
        raise RefusalError(
            "the last message is the assistant's, and there is nothing to answer",
            param="messages",
        )
    trained = _shared(chosen, _of_conversations)
    if trained is not None and trained.rows_kind == "prompt":
        if len(messages) > 1:
            were, know = ("was", "knows") if len(chosen.use.names) == 1 else ("were", "know")
            raise RefusalError(
                f"{', '.join(chosen.use.names)} {were} trained on prompts, and {know} no "
                "conversations: send one message of the user, or a prompt to /v1/completions",
                param="messages",
            )
        row = _prompt(trained, messages[-1].content)
        return encode_prompt(row, chosen.tokenizer, trained.data)
    data = trained.data if trained else DataConfig()
    row = MessagesRow(messages=tuple(messages), tools=tuple(tools))
    if not (tools or any("tool_calls" in message.keys for message in messages)):
        return encode_prompt(row, chosen.tokenizer, data)
    try:
        return encode_prompt(row, chosen.tokenizer, data)
    except DataError:
        plain = MessagesRow(messages=tuple(_without_tools(messages, tools)))
        return encode_prompt(plain, chosen.tokenizer, data)


def _without_tools(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The messages for a template that writes no tools: these and their calls as texts."""
    plain = [
        replace(
            each,
            # Templates without tools know no such turn, and many refuse it.
            role="user" if each.role == "tool" else each.role,
            content=_with_calls(each),
            keys={},
        )
        for each in messages
    ]
    if not tools:
        return plain
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = f"You can call these functions, with arguments in JSON:\n{listed}\n{HOW}"
    first = plain[0]
    if first.role == "system":
        return [replace(first, content=f"{first.content}\n\n{told}"), *plain[1:]]
    return [Message(role="system", content=told), *plain]


def _with_calls(message: Message) -> str:
    calls = [json.dumps(call["function"]) for call in message.keys.get("tool_calls", ())]
    return "\n".join(part for part in (message.content, *calls) if part)


def _prompt(trained: TrainedUse, text: str) -> Row:
    return PromptRow(prompt=text.removesuffix(trained.data.separator), completion=None)


def _shared(chosen: Chosen, way: Callable[[TrainedUse], str]) -> TrainedUse | None:
    """How the adapters were trained that answer; None: none of them says it.

    Args:
        chosen: what answers.
        way: in words, what of it decides how they are asked.

    Raises:
        RefusalError: it is not the same for all of them.
    """
    ways = dict.fromkeys(map(way, chosen.trained))
    if len(ways) > 1:
        raise RefusalError(
            f"{', '.join(chosen.use.names)} were not trained alike ({'; '.join(ways)}), so that no "
            "prompt is right for all: ask them one by one, or send token ids to /v1/completions",
            param="adapters",
        )
    return chosen.trained[0] if chosen.trained else None


def _of_texts(trained: TrainedUse) -> str:
    """How an adapter is asked to go on with a text."""
    if trained.rows_kind == "prompt":
        return f"prompts that end with {trained.data.separator!r}"
    return "texts or conversations"


def _of_conversations(trained: TrainedUse) -> str:
    """How an adapter is asked for the next turn of a conversation."""
    if trained.rows_kind == "prompt":
        return _of_texts(trained)
    own = trained.chat_template
    return "the base's chat template" if own is None else f"the chat template {own!r:.60}"
