"""The verb generate: what a model, with or without an adapter, writes after a prompt."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field, model_validator
from transformers import TextStreamer, set_seed

from lorakit.attachment.open_model import Opened, open_model
from lorakit.cli.verbs import Result
from lorakit.config.base import DType, HeldIn, PositiveInt, Settings
from lorakit.config.seed import Seed, generator_seed
from lorakit.data.encode import encode_prompt
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Row
from lorakit.errors import ConfigError, DataError
from lorakit.training.evaluation import answer, generation_settings


class GenerateConfig(Settings):
    """Settings of generate: the model and adapter, the prompts, and the search."""

    adapter: Path | None = None
    """Adapter folder; None: the model alone."""

    model: str | None = None
    """Base model. None: the one that the adapter was trained on."""

    prompt: str | None = None
    """One prompt, whose answer appears as it is written."""

    input: str | None = None
    """File with one prompt a line; - for standard input. Answers appear one a line."""

    chat: bool | None = None
    """Send prompts as a user's message through the chat template. None: as in training."""

    max_new_tokens: PositiveInt = 128
    """Longest answer, in tokens."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; more draws at random."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this probability together."""

    num_beams: PositiveInt = 1
    """Beams of the search; 1 is greedy."""

    seed: Seed = 0
    """Seed of what is drawn."""

    batch_size: PositiveInt = 16
    """Prompts of a file at once."""

    dtype: DType = "float32"
    """Precision of the base."""

    quantize: HeldIn = "as-trained"
    """How the base's linear layers are held: as-trained (as in the adapter's training), none (in
    `dtype`), 4bit or 8bit."""

    allow_other_base: bool = False
    """Accept a base with other weights than the adapter was trained on."""

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("top_p is of drawing at random, and temperature is 0: raise it")
        return self


SETTINGS: type[Settings] = GenerateConfig


def run(settings: GenerateConfig) -> Result:
    """Generate for one prompt, streamed to stdout, or for all prompts of a file."""
    if (settings.prompt is None) == (settings.input is None):
        raise ConfigError("give either prompt, or input (a file of prompts, - for standard input)")
    prompts = [settings.prompt] if settings.prompt is not None else _read(cast(str, settings.input))
    opened = open_model(
        settings.adapter,
        model=settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        allow_other_base=settings.allow_other_base,
    )
    if opened.task != "generation":
        raise ConfigError(f"this adapter does {opened.task}: it has labels, and writes no text")
    rows = list(_rows(prompts, settings, opened))
    ids = [encode_prompt(row, opened.tokenizer, opened.data) for row in rows]
    set_seed(generator_seed(settings.seed))
    if settings.prompt is not None:
        answers = [_stream(ids[0], settings, opened)]
        return Result(text="", data=_data(prompts, answers))
    answers = answer(
        opened.model,
        opened.tokenizer,
        ids,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=True,
        **_search(settings),
    )
    return Result(text="\n".join(answers), data=_data(prompts, answers))


def _data(prompts: list[str], answers: list[str]) -> dict[str, Any]:
    pairs = zip(prompts, answers, strict=True)
    return {"answers": [{"prompt": prompt, "answer": text} for prompt, text in pairs]}


def _read(source: str) -> list[str]:
    try:
        file = Path(source).expanduser()
        text = sys.stdin.read() if source == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"{source} has no prompts: give one a line")
    return prompts


def _rows(prompts: Iterable[str], settings: GenerateConfig, opened: Opened) -> Iterable[Row]:
    chat = settings.chat
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


def _search(settings: GenerateConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"num_beams": settings.num_beams}
    if settings.temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
    return options


@torch.no_grad()
def _stream(ids: list[int], settings: GenerateConfig, opened: Opened) -> str:
    """Generate one answer, write it to stdout word by word, and return it."""
    tokens = torch.tensor([ids], device=opened.model.device)
    streamer = None
    if settings.num_beams == 1:
        tokenizer = cast(Any, opened.tokenizer)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    limits = generation_settings(
        opened.tokenizer, max_new_tokens=settings.max_new_tokens, **_search(settings)
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
