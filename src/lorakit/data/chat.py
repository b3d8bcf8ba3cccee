"""Conversations as tokens: a chat template writes them, the assistant's turns are the targets."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import CALLS, MessagesRow
from lorakit.data.template_limits import check_template, written
from lorakit.errors import DataError

IGNORED = -100
"""The label of a token that is no target; torch's cross entropy ignores it by default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """A conversation as tokens."""

    ids: list[int]
    labels: list[int]
    """A token where it is a target, else IGNORED."""
    ends: frozenset[int]
    """The tokens that ended the target turns."""
    unwritten: frozenset[str]
    """Keys of messages that made no difference to what the template wrote."""


class ChatTemplate:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that there is a template.

        Raises:
            DataError: the tokenizer has none, or one that could take for ever.
        """
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {_named(tokenizer)} has no chat template, so messages cannot be"
                " written as it expects. Use rows with prompt and completion, or a model that was"
                " trained for chat."
            )
        check_template(tokenizer)
        self._tokenizer = tokenizer
        self._special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}

    def prompt(self, row: MessagesRow) -> list[int]:
        """The tokens before the assistant's next turn, or before its last one if that ends them.

        Raises:
            UnusableRowError: nothing precedes the assistant, or the template refuses the messages
                or does not write their tools.
        """
        messages = row.messages
        before = messages[:-1] if messages[-1].role == "assistant" else messages
        if not before:
            raise UnusableRowError("nothing precedes the assistant's turn")
        asked = replace(row, messages=before)
        text = self._render(asked, assistant_next=True)
        self._unwritten(asked, text, assistant_next=True)
        return self._ids(text)

    def example(self, row: MessagesRow) -> Conversation | None:
        """The tokens of a conversation and their labels, up to the last turn that is trained.

        Target tokens are the assistant's turns with their end-of-turn tokens; other labels are
        IGNORED. A turn that opens the conversation is no target, since it answers nothing. Few
        templates mark what the assistant generates, so each turn is found as the difference of two
        renderings: up to the turn, and with it.

        Returns:
            None: no turn is a target.

        Raises:
            UnusableRowError: the template refuses the messages, does not write their tools, or
                writes a turn differently according to what follows it.
        """
        messages = row.messages
        turns = [i for i, m in enumerate(messages) if i > 0 and m.role == "assistant" and m.trained]
        if not turns:
            return None
        row = replace(row, messages=messages[: turns[-1] + 1])
        whole = self._render(row)
        ids = self._ids(whole)
        labels = [IGNORED] * len(ids)
        ends = set()
        for turn in turns:
            before = self._render(replace(row, messages=messages[:turn]), assistant_next=True)
            after = self._render(replace(row, messages=messages[: turn + 1]))
            if not (whole.startswith(after) and after.startswith(before)):
                raise UnusableRowError(
                    f"the chat template writes message {turn + 1} in another way once more follows,"
                    " so its tokens cannot be told apart: give each answer a row of its own"
                )
            start, stop = (_shared(ids, self._ids(text)) for text in (before, after))
            stop = self._end_of_turn(ids, start, stop)
            labels[start:stop] = ids[start:stop]
            ends |= {ids[stop - 1]} & self._special
        if ids[-1] not in self._special and stop == len(ids):
            ids.append(end_token(self._tokenizer))
            labels.append(ids[-1])
            ends.add(ids[-1])
        return Conversation(
            ids=ids,
            labels=labels,
            ends=frozenset(ends),
            unwritten=self._unwritten(row, whole),
        )

    def _end_of_turn(self, ids: Sequence[int], start: int, stop: int) -> int:
        """The index at which a turn ends: after its last special token, unless text follows it."""
        special = [i for i in range(start, stop) if ids[i] in self._special]
        if not special or str(self._tokenizer.decode(list(ids[special[-1] + 1 : stop]))).strip():
            return stop
        return special[-1] + 1

    def _unwritten(
        self, row: MessagesRow, text: str, *, assistant_next: bool = False
    ) -> frozenset[str]:
        """The keys without which the template writes the same.

        Raises:
            UnusableRowError: these are tools or their calls.
        """
        keys = {key for message in row.messages for key in message.keys}
        same = {
            key
            for key in keys
            if self._render(_without(row, key), assistant_next=assistant_next) == text
        }
        untooled = replace(row, tools=())
        if row.tools and self._render(untooled, assistant_next=assistant_next) == text:
            same.add("tools")
        lost = [key for key in ("tools", *CALLS) if key in same]
        if lost:
            raise UnusableRowError(
                f"the chat template does not write {' and '.join(lost)}: use a model that was"
                " trained to call tools"
            )
        return frozenset(same)

    def _render(self, row: MessagesRow, *, assistant_next: bool = False) -> str:
        try:
            return self._written(row, assistant_next=assistant_next)
        except TypeError:
            # Some templates append the arguments of a call to a text, others write an object.
            row = _with_arguments_as_text(row)
        try:
            return self._written(row, assistant_next=assistant_next)
        except TypeError as error:
            raise UnusableRowError(f"the chat template refuses the messages: {error}") from error

    def _written(self, row: MessagesRow, *, assistant_next: bool) -> str:
        turns = [{"role": m.role, "content": m.content, **m.keys} for m in row.messages]
        try:
            return written(
                self._tokenizer,
                turns,
                tools=list(row.tools) or None,
                add_generation_prompt=assistant_next,
            )
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses the messages: {error}") from error

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens that open and close a conversation.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def with_template(tokenizer: PreTrainedTokenizerBase, template: Any) -> PreTrainedTokenizerBase:
    """A tokenizer with another chat template, which leaves the first as it is; None: the same."""
    if template is None:
        return tokenizer
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer.

    Raises:
        DataError: the tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            f"The tokenizer of {_named(tokenizer)} has no end-of-sequence token, so an answer could"
            " not end. Only generative models can be trained to write text."
        )
    return end


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this model"


def _shared(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """The number of equal tokens at the start; a prefix's last token may differ in the whole."""
    pairs = zip(ids, prefix, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _without(row: MessagesRow, key: str) -> MessagesRow:
    """A conversation whose messages lack a key."""
    messages = (
        replace(message, keys={k: value for k, value in message.keys.items() if k != key})
        for message in row.messages
    )
    return replace(row, messages=tuple(messages))


def _with_arguments_as_text(row: MessagesRow) -> MessagesRow:
    """A conversation in whose tool calls the arguments are JSON text."""

    def call(given: dict[str, Any]) -> dict[str, Any]:
        made = {k: call(v) if k == "function" else v for k, v in given.items()}
        if isinstance(made.get("arguments"), dict):
            made["arguments"] = json.dumps(made["arguments"], ensure_ascii=False)
        return made

    messages = (
        replace(m, keys={**m.keys, "tool_calls": [call(each) for each in m.keys["tool_calls"]]})
        if "tool_calls" in m.keys
        else m
        for m in row.messages
    )
    return replace(row, messages=tuple(messages))
