"""The verb generate: what a model, with or without an adapter, writes after a prompt."""

import sys
from pathlib import Path

from lorakit.answering.generate import answers, stream
from lorakit.attachment.open_model import opened_model
from lorakit.cli.verbs import Result
from lorakit.config.answering import GenerateConfig
from lorakit.errors import ConfigError, DataError


def run(settings: GenerateConfig) -> Result:
    """Generate for one prompt, streamed to stdout, or for all prompts of a file."""
    prompt, file = settings.prompt, settings.input
    if (prompt is None) == (file is None):
        raise ConfigError("give either prompt, or input (a file of prompts, - for standard input)")
    prompts = [prompt] if prompt is not None else _read(file or "")
    with opened_model(settings, settings.adapter, settings.model) as opened:
        if prompt is not None:
            texts = [stream(settings, opened, prompt)]
        else:
            texts = answers(settings, opened, prompts, progress=True)
    pairs = zip(prompts, texts, strict=True)
    return Result(
        text="" if prompt is not None else "\n".join(texts),
        data={"answers": [{"prompt": asked, "answer": text} for asked, text in pairs]},
    )


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
