"""What a request asks, as the tokens that the model reads: as in training, where an adapter was."""

from __future__ import annotations

from collections.abc import Sequence

from lorakit.config.train import DataConfig
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row, TextRow
from lorakit.serving.catalog import Chosen
from lorakit.serving.refusals import RefusalError


def text_ids(chosen: Chosen, text: str) -> list[int]:
    """The tokens of a text to go on with.

    An adapter that was trained on prompts gets what stood between prompt and answer in training,
    where the text does not end with it.
    """
    trained, row = chosen.trained, TextRow(text=text)
    if trained is not None and trained.rows_kind == "prompt":
        return encode_prompt(_prompt(chosen, text), chosen.tokenizer, trained.data)
    return encode_prompt(row, chosen.tokenizer, DataConfig())


def chat_ids(chosen: Chosen, messages: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to the assistant's next turn.

    An adapter that was trained on prompts gets the one message of the user as a prompt.

    Raises:
        RefusalError: the assistant has spoken last; or the adapter was trained on prompts, and this
            is more than one.
        DataError: there is no chat template, or it refuses the messages.
    """
    if messages[-1].role == "assistant":
        raise RefusalError(
            "the last message is the assistant's, and there is nothing to answer",
            param="messages",
        )
    trained = chosen.trained
    if trained is not None and trained.rows_kind == "prompt":
        if len(messages) > 1:
            raise RefusalError(
                f"{chosen.name} was trained on prompts, and knows no conversations: send one "
                "message of the user, or a prompt to /v1/completions",
                param="messages",
            )
        row = _prompt(chosen, messages[-1].content)
        return encode_prompt(row, chosen.tokenizer, trained.data)
    row = MessagesRow(messages=tuple(messages))
    return encode_prompt(row, chosen.tokenizer, trained.data if trained else DataConfig())


def _prompt(chosen: Chosen, text: str) -> Row:
    assert chosen.trained is not None
    return PromptRow(prompt=text.removesuffix(chosen.trained.data.separator), completion=None)
