"""What a model, with or without an adapter, writes after a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from lorakit.adapter.adapter import AdapterSource
from lorakit.attachment.open_model import ModelSource, Opened, opened_model
from lorakit.config.answering import GenerateConfig
from lorakit.config.seed import generator_seed
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row
from lorakit.errors import ConfigError
from lorakit.training.evaluation import answer, generation_settings


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
    """
    config = GenerateConfig(**settings)
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    with opened_model(config, adapter, model, tokenizer) as opened:
        return answers(config, opened, asked, progress=progress)


def answers(
    config: GenerateConfig, opened: Opened, prompts: Sequence[str], *, progress: bool
) -> list[str]:
    """The text after each prompt."""
    ids = _encoded(config, opened, prompts)
    set_seed(generator_seed(config.seed))
    return answer(
        opened.model,
        opened.tokenizer,
        ids,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        progress=progress,
        **_search(config),
    )


@torch.no_grad()
def stream(config: GenerateConfig, opened: Opened, prompt: str) -> str:
    """The text after one prompt, written to stdout word by word as it is generated."""
    (ids,) = _encoded(config, opened, [prompt])
    set_seed(generator_seed(config.seed))
    tokens = torch.tensor([ids], device=opened.model.device)
    streamer = None
    if config.num_beams == 1:
        tokenizer = cast(Any, opened.tokenizer)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    limits = generation_settings(
        opened.tokenizer, max_new_tokens=config.max_new_tokens, **_search(config)
    )
    written = cast(Any, opened.model).generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        generation_config=limits,
        streamer=streamer,
    )
    text = opened.tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    if streamer is None:
        print(text)
    return text.strip()


def _encoded(config: GenerateConfig, opened: Opened, prompts: Sequence[str]) -> list[list[int]]:
    """The token ids of each prompt.

    Raises:
        ConfigError: the model writes no text.
    """
    if opened.task != "generation":
        raise ConfigError(f"this adapter does {opened.task}: it has labels, and writes no text")
    rows = _rows(prompts, config, opened)
    return [encode_prompt(row, opened.tokenizer, opened.data) for row in rows]


def _rows(prompts: Iterable[str], config: GenerateConfig, opened: Opened) -> Iterator[Row]:
    chat = config.chat
    if chat is None:
        # Without an adapter, a model with a chat template gets prompts as messages.
        trained = opened.adapter.card.get("rows_kind") if opened.adapter else None
        template = getattr(opened.tokenizer, "chat_template", None)
        chat = trained == "messages" if opened.adapter else template is not None
    for prompt in prompts:
        if chat:
            yield MessagesRow(messages=(Message(role="user", content=prompt),))
        else:
            yield PromptRow(prompt=prompt, completion="")


def _search(config: GenerateConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"num_beams": config.num_beams}
    if config.temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
        }
    return options
