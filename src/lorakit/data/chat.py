"""Conversations as tokens: a chat template writes them, the assistant's turns are the targets."""

from collections.abc import Sequence
from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import Message
from lorakit.data.template_limits import check_template, written
from lorakit.errors import DataError

IGNORED = -100
"""The label of a token that is no target; torch's cross entropy ignores it by default."""


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

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens before the assistant's next turn, or before its last one if that ends them.

        Raises:
            UnusableRowError: nothing precedes the assistant, or the template refuses the messages.
        """
        before = messages[:-1] if messages[-1].role == "assistant" else messages
        if not before:
            raise UnusableRowError("nothing precedes the assistant's turn")
        return self._ids(self._render(before, assistant_next=True))

    def example(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The tokens of a conversation and their labels, up to the assistant's last turn.

        Target tokens are the assistant's turns with their end-of-turn tokens; other labels are
        IGNORED. A turn that opens the conversation is no target, since it answers nothing. Few
        templates mark what the assistant generates, so each turn is found as the difference of two
        renderings: up to the turn, and with it.

        Raises:
            UnusableRowError: the template refuses the messages, or writes a turn differently
                according to what follows it.
        """
        turns = [i for i, m in enumerate(messages) if i > 0 and m.role == "assistant"]
        if not turns:
            return [], []
        whole = self._render(messages[: turns[-1] + 1])
        ids = self._ids(whole)
        labels = [IGNORED] * len(ids)
        for turn in turns:
            before = self._render(messages[:turn], assistant_next=True)
            after = self._render(messages[: turn + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise UnusableRowError(
                    f"the chat template writes message {turn + 1} in another way once more follows,"
                    " so its tokens cannot be told apart: give each answer a row of its own"
                )
            start, stop = (_shared(ids, self._ids(text)) for text in (before, after))
            stop = self._end_of_turn(ids, start, stop)
            labels[start:stop] = ids[start:stop]
        if ids[-1] not in self._special and stop == len(ids):
            ids.append(end_token(self._tokenizer))
            labels.append(ids[-1])
        return ids, labels

    def _end_of_turn(self, ids: Sequence[int], start: int, stop: int) -> int:
        """The index at which a turn ends: after its last special token, if it has one."""
        special = [i for i in range(start, stop) if ids[i] in self._special]
        return special[-1] + 1 if special else stop

    def _render(self, messages: Sequence[Message], *, assistant_next: bool = False) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return written(self._tokenizer, turns, add_generation_prompt=assistant_next)
        except TemplateError as error:
            raise UnusableRowError(f"the chat template refuses the messages: {error}") from error

    def _ids(self, text: str) -> list[int]:
        # The template has written the special tokens that open and close a conversation.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


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
