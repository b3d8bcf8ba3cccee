"""Chat templates within limits: they come with a model, and are programs.

transformers runs them in Jinja's sandbox, which keeps them from Python and from files. It does not
keep them from looping for hours, or from filling the memory.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lorakit.data.problems import UnusableRowError
from lorakit.errors import DataError

MOST_SECONDS = 10.0
"""For one conversation; a template writes a long one in a few hundredths of a second."""
MOST_BYTES = 2**30
"""Memory that a template may take beyond what the process has."""
MOST_TEMPLATE_CHARACTERS = 2**20
"""Length of a template; those of large models have a few ten thousand."""
MOST_CHARACTERS = 2**26
"""Length of what is written."""

_STATM = Path("/proc/self/statm")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that could do much within one step.

    Raises:
        DataError: it is too long, or computes powers (Jinja does so while it compiles).
    """
    template: Any = tokenizer.chat_template
    for text in template.values() if isinstance(template, Mapping) else [template]:
        if len(text) > MOST_TEMPLATE_CHARACTERS:
            raise DataError(f"the chat template has {len(text):,} characters: it is none")
        try:
            tokens = list(jinja2.Environment().lex(text))
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is not one: {error}") from error
        if any(kind == "operator" and word == "**" for _, kind, word in tokens):
            raise DataError(
                "the chat template computes a power (**), which no conversation needs and which "
                "could take for ever: write it without"
            )


def written(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], **settings: Any
) -> str:
    """The text of a conversation, by the tokenizer's chat template, within limits.

    Args:
        tokenizer: whose template.
        turns: of the conversation.
        settings: for `apply_chat_template`.

    Raises:
        UnusableRowError: it took too long, too much memory, or wrote too much.
    """
    try:
        with _MEMORY, _limited_time():
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, **settings))
    except MemoryError as error:
        raise UnusableRowError(f"the chat template takes more than {MOST_BYTES:,} bytes") from error
    if len(text) > MOST_CHARACTERS:
        raise UnusableRowError(
            f"the chat template writes {len(text):,} characters for this conversation"
        )
    return text


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Stop a template after some time: at its next line, which Python tells us of."""
    deadline = time.monotonic() + MOST_SECONDS

    def at_call(frame: FrameType, event: str, argument: object) -> Any:
        # Jinja compiles a template to code of this file name.
        file = frame.f_code.co_filename
        return at_line if file == "<template>" or "jinja2" in file else None

    def at_line(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > deadline:
            raise UnusableRowError(f"the chat template takes more than {MOST_SECONDS:g} seconds")
        return at_line

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield
    finally:
        sys.settrace(before)


class MemoryLimit:
    """Lets the process have only so much more memory, where the system can say that (Linux).

    The limit is the process's: of several threads within it at once, as a server has them, the last
    one to leave takes it off.
    """

    def __init__(self) -> None:
        """Nobody is within it yet."""
        self._lock = threading.Lock()
        self._within = 0
        self._before = (0, 0)

    def __enter__(self) -> None:
        """Set the limit."""
        if not _STATM.exists():
            return
        import resource

        with self._lock:
            if not self._within:
                self._before = resource.getrlimit(resource.RLIMIT_AS)
            self._within += 1
            pages = int(_STATM.read_text().split()[0])
            most = pages * resource.getpagesize() + MOST_BYTES
            allowed = [each for each in (most, *self._before) if each != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(allowed), self._before[1]))

    def __exit__(self, *_: object) -> None:
        """Take it off, if nobody else is within it."""
        if not _STATM.exists():
            return
        import resource

        with self._lock:
            self._within -= 1
            if not self._within:
                resource.setrlimit(resource.RLIMIT_AS, self._before)


_MEMORY = MemoryLimit()
