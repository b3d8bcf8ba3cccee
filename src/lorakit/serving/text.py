"""The text of an answer as it grows, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode where the bytes of a character are not complete."""


@runtime_checkable
class Decodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any:
        """The text of tokens."""


class GrowingText:
    """Decodes tokens one after the other, and gives text as soon as nothing can change it.

    What may be the beginning of a stop text, or of a character whose bytes are not complete, is
    kept back until more is known.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer, before its first such text.
        include_stop: whether the text that ended the answer is part of it.
        skip_special: leave special tokens out.
    """

    def __init__(
        self,
        tokenizer: Decodes,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._context = 0
        """Where the tokens begin that are decoded again, since a token's text depends on those
        before it (a leading space)."""
        self._decoded = 0
        """Where the tokens begin whose text is not decoded yet."""
        self._kept = ""
        self.stopped: str | None = None
        """The stop text that ended the answer."""
        self.length = 0
        """The characters that were decoded so far, given or kept back."""

    def add(self, token: int) -> str:
        """The text that is certain after one token more."""
        self._ids.append(token)
        new = self._new_text()
        # A token without text, such as a special one, is no context for the space of the next.
        if not new or new.endswith(UNFINISHED):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._certain(new)

    def end(self) -> str:
        """The text that was kept back, once the answer is over."""
        if self.stopped is not None:
            return ""
        given = self._certain(self._new_text())
        if self.stopped is None:
            given, self._kept = given + self._kept, ""
        return given

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._decoded])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special))

    def _certain(self, new: str) -> str:
        self.length += len(new)
        text = self._kept + new
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.stopped = min(found)
            self._kept = ""
            return text[: at + len(self.stopped)] if self._include_stop else text[:at]
        kept = max((shared_end(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]


def shared_end(text: str, stop: str) -> int:
    """How long an end of a text is with which a stop text begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
