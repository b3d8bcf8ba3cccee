"""What a model, with or without an adapter, writes after a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from lorakit.adapter.adapter import AdapterSource
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
from lorakit.config.answering import GenerateConfig
from lorakit.config.seed import generator_seed
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row
from lorakit.errors import ConfigError
from lorakit.kernels.few_rows import few_rows


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
        ConfigError: the model writes no text.
    """
    if opened.task != "generation":
        what = "adapter" if opened.adapter else "model"
        raise ConfigError(f"this {what} does {opened.task}: it has labels, and writes no text")
    rows = _rows(prompts, config, opened)
    two = opened.model.config.is_encoder_decoder
    return [encode_prompt(row, opened.tokenizer, opened.data, encoder_decoder=two) for row in rows]


def _rows(prompts: Iterable[str], config: GenerateConfig, opened: Opened) -> Iterator[Row]:
    chat = config.chat
    if chat is None:
        # Without an adapter, a model with a chat template gets prompts as messages.
        use = TrainedUse.on(opened.adapter.card) if opened.adapter else None
        chat = use.as_messages if use else opened.base_template is not None
    for prompt in prompts:
        if chat:
            yield MessagesRow(messages=(Message(role="user", content=prompt),))
        else:
            yield PromptRow(prompt=prompt, completion=None)
