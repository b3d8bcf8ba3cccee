"""The verb generate: what a model, with or without an adapter, writes after a prompt."""

import sys
from collections.abc import Iterable, Sequence
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
    lines = [prompt] if prompt is not None else _lines(file or "")
    prompts = [line for line in lines if line.strip()] if prompt is None else lines
    with opened_model(settings, settings.adapter, settings.model) as opened:
        if prompt is not None:
            texts = [stream(settings, opened, prompt, note=_note)]
        else:
            texts = answers(settings, opened, prompts, progress=True, note=_note)
    pairs = zip(prompts, texts, strict=True)
    return Result(
        text="" if prompt is not None else _one_a_line(lines, texts),
        data={"answers": [{"prompt": asked, "answer": text} for asked, text in pairs]},
    )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _lines(source: str) -> list[str]:
    """The lines of a file of prompts, which end with a line feed alone, as JSON lines do.

    Raises:
        DataError: the file cannot be read, or has nothing but blank lines.
    """
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    if not any(line.strip() for line in lines):
        raise DataError(f"{source} has no prompts: give one a line")
    return lines


def _one_a_line(lines: Sequence[str], texts: Iterable[str]) -> str:
    """A line for each line of the file: the answer, or nothing where the line is blank.

    Line breaks in an answer are written as \\n and \\r.
    """
    left = iter(texts)
    made = (next(left) if line.strip() else "" for line in lines)
    return "\n".join(text.translate(_ESCAPES) for text in made)


_ESCAPES = str.maketrans({"\n": r"\n", "\r": r"\r"})
