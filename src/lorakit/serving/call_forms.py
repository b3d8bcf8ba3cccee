"""How a model writes a call of a tool: as its chat template writes one, or in our own form."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lorakit.data.problems import UnusableRowError
from lorakit.data.template_limits import written
from lorakit.serving.grammars import Grammars


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """The text around calls: opening NAME middle ARGUMENTS (between NAME middle ARGUMENTS)*
    closing."""

    opening: str
    middle: str
    closing: str
    between: str | None
    """None: an answer calls once."""
    special: Mapping[str, int] = field(default_factory=dict)
    """The tokens in these texts that grammars know by their ids alone."""

    @cached_property
    def trigger(self) -> str:
        """The beginning of `opening` that no other text has, such as a tag or a special token.

        Empty: there is none, and only an answer that begins like a call is one.
        """
        first = next(iter(self.pieces(self.opening)))
        if first in self.special:
            return first
        found = re.match(r"[^\s{}\[\]()\"':,]{3,}", first)
        return found[0] if found else ""

    def is_hidden(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether some of it is left out where special tokens are."""
        return any(tokenizer.added_tokens_decoder[i].special for i in self.special.values())

    def pieces(self, text: str) -> Iterator[str]:
        """A text, apart at its special tokens."""
        if not self.special:
            yield text
            return
        longest_first = sorted(self.special, key=len, reverse=True)
        apart = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        yield from (piece for piece in apart if piece)


OURS = CallForm(
    opening='{"name": "', middle='", "arguments": ', closing="}", between='}\n{"name": "'
)
"""The form for models whose chat template writes no calls."""
HOW = 'To call one, answer {"name": NAME, "arguments": ARGUMENTS} and nothing else.'
"""What such a model is told of it."""


class CallForms:
    """The forms of calls, by chat template.

    Args:
        grammars: in which they are to be written.
    """

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._known: dict[tuple[str, frozenset[int]], CallForm] = {}

    def of(self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> CallForm:
        """The form in which a tokenizer's chat template writes calls, or ours.

        Args:
            tokenizer: with the chat template.
            ends: the tokens that end an answer.

        Raises:
            GrammarError: answers of this model can't be bound.
        """
        key = (str(tokenizer.chat_template), ends)
        if key not in self._known:
            special = self._grammars.special_tokens(ends)
            found = _found(tokenizer, ends, special) if tokenizer.chat_template else None
            self._known[key] = found or OURS
        return self._known[key]


NAMES = ("first_function_of_probe", "second_function_of_probe")
ARGUMENTS: tuple[dict[str, Any], ...] = ({"first_argument": "one"}, {"second_argument": "two"})
CONTENT = "the content of an answer"
IDS = ("firstcall", "othercall")
"""Of nine characters, as Mistral's templates want them."""


def _found(
    tokenizer: PreTrainedTokenizerBase, ends: Collection[int], special: Mapping[str, int]
) -> CallForm | None:
    """The form of calls that a chat template writes; None: none that has arguments in JSON."""
    closings = [str(tokenizer.decode([end])) for end in sorted(ends)]
    # Several calls at once, or a turn after them, are more than some templates take.
    for count, answered in itertools.product((2, 1), (True, False)):
        try:
            text = _answer(tokenizer, count, answered=answered)
        except (TemplateError, TypeError, UnusableRowError):
            continue
        form = _read(text, count, closings, special)
        if form is not None:
            return form
    return None


def _answer(tokenizer: PreTrainedTokenizerBase, count: int, *, answered: bool) -> str:
    """What a chat template writes of an answer with so many calls, and after it."""
    calls = [
        {"id": own, "type": "function", "function": {"name": name, "arguments": arguments}}
        for own, name, arguments in zip(IDS, NAMES, ARGUMENTS, strict=True)
    ][:count]
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": "A probe.",
                "parameters": {"type": "object", "properties": {}},
            },
        }
        for name in NAMES
    ]
    asked: list[dict[str, Any]] = [{"role": "user", "content": "Call them."}]
    calling = [*asked, {"role": "assistant", "content": "", "tool_calls": calls}]
    if answered:
        calling += [{"role": "tool", "tool_call_id": each, "content": "1"} for each in IDS[:count]]
    how: dict[str, Any] = {"tools": tools, "add_generation_prompt": False}
    text = written(tokenizer, calling, **how)
    # What opens the turn: a prompt for an answer may have more, such as the start of a thought.
    speaking = [*asked, {"role": "assistant", "content": CONTENT}]
    openings = [
        written(tokenizer, asked, tools=tools, add_generation_prompt=True),
        written(tokenizer, speaking, **how).partition(CONTENT)[0],
    ]
    lengths = [len(opening) for opening in openings if text.startswith(opening)]
    return text[max(lengths) :] if lengths else ""


def _read(
    text: str, count: int, closings: Sequence[str], special: Mapping[str, int]
) -> CallForm | None:
    """The form in which calls are written in a text that ends with an answer's end."""
    parts = []
    for name, arguments in list(zip(NAMES, ARGUMENTS, strict=True))[:count]:
        for known in (name, json.dumps(arguments)):
            part, found, text = text.partition(known)
            if not found:
                return None
            parts.append(part)
    ends = [text.index(closing) for closing in closings if closing in text]
    if not ends or len(set(parts[1::2])) > 1:
        return None
    opening, middle, closing = parts[0].lstrip(), parts[1], text[: min(ends)].rstrip()
    between = parts[2] if count == 2 else None
    told = opening + middle + closing + (between or "")
    # A form with the calls' own ids would have the model invent some.
    if not (opening and middle and not any(each in told for each in IDS)):
        return None
    used = {name: number for name, number in special.items() if name in told}
    return CallForm(opening=opening, middle=middle, closing=closing, between=between, special=used)
