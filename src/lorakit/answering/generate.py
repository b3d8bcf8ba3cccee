"""What a model, with or without an adapter, writes after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from lorakit.adapter.adapter import Adapter, AdapterSource
from lorakit.adapter.card import TrainedUse
from lorakit.answering.answer import (
    Note,
    answer,
    answer_start,
    fitted,
    generation_settings,
    sampling_of,
    text_of,
    warn,
)
from lorakit.answering.beam_search import search_of
from lorakit.answering.ends import ends_of_rows
from lorakit.attachment.open_model import ModelSource, Opened, opened_model
from lorakit.attachment.state import require_attachment
from lorakit.config.answering import GenerateConfig
from lorakit.config.seed import generator_seed
from lorakit.config.train import DataConfig
from lorakit.data.chat import with_template
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row
from lorakit.errors import ConfigError
from lorakit.kernels.few_rows import few_rows
from lorakit.models.load import model_name
from lorakit.models.tasks import check_does
from lorakit.routing.row_parts import names_of_rows


def generate(
    prompts: str | Sequence[str],
    *,
    adapter: AdapterSource | None = None,
    model: ModelSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    **settings: Any,
) -> list[str]:
    """The text that a model writes after each prompt, with an adapter or without.

    On a loaded model within `lk.route` or `bank.route` for rows, each prompt is a row: its own
    adapter answers it.

    Args:
        prompts: one text, or several.
        adapter: a folder, a hub id, or an `Adapter`. None: the model alone; a loaded one as it is.
        model: the base by name, or a loaded one, which is left as it was found. None: the base
            that the adapter was trained on.
        tokenizer: that of a loaded model.
        progress: show a bar on stderr.
        settings: those of `lorakit generate`, such as max_new_tokens=20 or temperature=0.7.

    Raises:
        LorakitError: a setting is wrong, or the model or the adapter cannot be used.

    Examples:
        >>> prompts = ["The sea is", "Bread is"]
        >>> len(lk.generate(prompts, adapter="out/places", max_new_tokens=5))
        2
        >>> answer = lk.generate("The sea is", model=model, tokenizer=tokenizer, max_new_tokens=5)
    """
    config = GenerateConfig(**settings)
    asked: Any = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(asked, Sequence) or not all(isinstance(text, str) for text in asked):
        raise ConfigError(f"prompts are a text or a list of texts; found {prompts!r}")
    with opened_model(config, adapter, model, tokenizer) as opened:
        return answers(config, opened, asked, progress=progress)


def answers(
    config: GenerateConfig,
    opened: Opened,
    prompts: Sequence[str],
    *,
    progress: bool,
    note: Note = warn,
) -> list[str]:
    """The text after each prompt; `note` is called with each remark on what was cut short."""
    ids = _encoded(config, opened, prompts)
    set_seed(generator_seed(config.seed))
    return answer(
        opened.model,
        opened.tokenizer,
        ids,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        search=search_of(config) or sampling_of(config),
        stop=config.stop,
        progress=progress,
        note=note,
    )


@torch.no_grad()
def stream(config: GenerateConfig, opened: Opened, prompt: str, *, note: Note = warn) -> str:
    """The text after one prompt, written to stdout: word by word, but for a beam search's."""
    if config.num_beams > 1:
        (text,) = answers(config, opened, [prompt], progress=False, note=note)
        print(text)
        return text
    fit = fitted(
        opened.model,
        opened.tokenizer,
        _encoded(config, opened, [prompt]),
        max_new_tokens=config.max_new_tokens,
    )
    for remark in fit.remarks:
        note(remark)
    set_seed(generator_seed(config.seed))
    tokens = torch.tensor(fit.prompts, device=opened.model.device)
    (ends,) = ends_of_rows(opened.model, opened.tokenizer, 1, stop=config.stop)
    tokenizer = cast(Any, opened.tokenizer)
    settings = generation_settings(
        opened.tokenizer, ends, max_new_tokens=fit.rooms[0], sampling=sampling_of(config)
    )
    with few_rows(opened.model, 1):
        written = cast(Any, opened.model).generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return text_of(
        opened.tokenizer, written[0, answer_start(opened.model, tokens) :].tolist(), ends
    )


def _encoded(config: GenerateConfig, opened: Opened, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        ConfigError: the model has labels.
        ModelError: it is an encoder.
    """
    if opened.task != "generation":
        what = "adapter" if opened.adapter else "model"
        raise ConfigError(f"this {what} does {opened.task}: it has labels, and writes no text")
    check_does(model_name(opened.model), opened.model.config, opened.task)
    two = opened.model.config.is_encoder_decoder
    return [
        encode_prompt(_row(prompt, use), use.tokenizer, use.data, encoder_decoder=two)
        for prompt, use in zip(prompts, _uses(config, opened, len(prompts)), strict=True)
    ]


@dataclass(frozen=True)
class _Use:
    """How a prompt is put to the model."""

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    as_message: bool


def _uses(config: GenerateConfig, opened: Opened, rows: int) -> list[_Use]:
    """How each prompt is put: as its adapter was trained, the first one of a combination.

    Raises:
        AdapterFileError: the card of an adapter has entries that training does not write.
        RouteError: the route is for another number of rows.
    """

    def use_of(adapter: Adapter | None) -> _Use:
        # Without an adapter, a model with a chat template gets prompts as messages.
        chat, tokenizer, data = opened.base_template is not None, opened.tokenizer, opened.data
        if adapter is not None:
            use = TrainedUse.on(adapter.card)
            chat = use.as_messages
            if adapter is not opened.adapter:
                tokenizer, data = with_template(tokenizer, use.chat_template), use.data
        return _Use(tokenizer, data, chat if config.chat is None else config.chat)

    names = names_of_rows(opened.model, rows)
    if opened.adapter is not None or not any(names):
        return [use_of(opened.adapter)] * rows
    distinct = {each[0] for each in names if each}
    attached = require_attachment(opened.model).adapters
    own = {name: use_of(attached[name].record) for name in distinct}
    base = use_of(None)
    return [own[each[0]] if each else base for each in names]


def _row(prompt: str, use: _Use) -> Row:
    if use.as_message:
        return MessagesRow(messages=(Message(role="user", content=prompt),))
    return PromptRow(prompt=prompt, completion=None)
