"""What an answer may be: a grammar that forbids every token after which it could not be one."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.errors import LorakitError, MissingExtraError

SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON is spaced as Python spaces it: where white space is free, small models write it for ever."""


class GrammarError(LorakitError):
    """A grammar or schema that cannot be compiled."""


@dataclass(frozen=True)
class Rule:
    """What an answer must be, in the words of one of the kinds."""

    kind: str
    """json (a JSON schema), regex, lark, or choice (a list of texts)."""
    text: str
    """In JSON, but for regex and lark."""

    @staticmethod
    def of_schema(schema: Mapping[str, Any] | bool) -> Rule:
        """JSON that a schema allows."""
        return Rule("json", json.dumps(schema, sort_keys=False))

    @staticmethod
    def of_choice(texts: Sequence[str]) -> Rule:
        """One of some texts."""
        return Rule("choice", json.dumps(list(texts)))


class Grammars:
    """Compiles grammars for the tokens of one base.

    Args:
        tokenizer: of the base.
        vocabulary: the number of token ids that the model knows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._by_ends: dict[frozenset[int], Any] = {}
        self._lock = threading.Lock()

    def compiled(self, rule: Rule, ends: frozenset[int]) -> Matcher:
        """A grammar at its beginning.

        Args:
            rule: what the answer must be.
            ends: the tokens that end an answer, allowed where the grammar may end.

        Raises:
            GrammarError: it cannot be compiled.
            MissingExtraError: the library is not installed.
        """
        try:
            import llguidance
        except ImportError:
            raise MissingExtraError("grammars", "serve") from None
        made = llguidance.LLMatcher(self._tokens(ends), _grammar(rule), log_level=0)
        if made.is_error():
            reason = made.get_error().strip().splitlines()[0]
            raise GrammarError(f"the {_WORDS[rule.kind]} cannot be compiled: {reason}")
        return Matcher(made, self._vocabulary)

    def special_tokens(self, ends: frozenset[int]) -> dict[str, int]:
        """The ids of tokens that are no text to a grammar, by what is written for them.

        Args:
            ends: the tokens that end an answer.

        Raises:
            GrammarError: there are no grammars for this tokenizer.
        """
        known, added = self._tokens(ends), self._tokenizer.added_tokens_decoder
        return {token.content: i for i, token in added.items() if known.is_special_token(i)}

    def _tokens(self, ends: frozenset[int]) -> Any:
        """The tokenizer in the library's form, which takes a second to make."""
        from llguidance.hf import from_tokenizer

        with self._lock:
            if ends not in self._by_ends:
                tokenizer: Any = self._tokenizer
                try:
                    self._by_ends[ends] = from_tokenizer(
                        tokenizer, n_vocab=self._vocabulary, eos_token=sorted(ends) or None
                    )
                except Exception as error:
                    # Whatever it was, this tokenizer is none whose tokens are bytes of a text.
                    raise GrammarError(
                        f"answers of this model can't be bound by grammars: {error}"
                    ) from error
            return self._by_ends[ends]


_WORDS = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar", "choice": "list"}


def _grammar(rule: Rule) -> str:
    """A rule in the library's form.

    Raises:
        GrammarError: it is none.
    """
    from llguidance import LLMatcher

    try:
        match rule.kind:
            case "json":
                spacing: Any = SPACING
                return LLMatcher.grammar_from_json_schema(rule.text, overrides=spacing)
            case "regex":
                return LLMatcher.grammar_from_regex(rule.text)
            case "choice":
                texts = " | ".join(json.dumps(text) for text in json.loads(rule.text))
                return LLMatcher.grammar_from_lark(f"start: {texts}")
            case _:
                return LLMatcher.grammar_from_lark(rule.text)
    except ValueError as error:
        raise GrammarError(f"the {_WORDS[rule.kind]} cannot be compiled: {error}") from None


class Matcher:
    """A grammar and how far an answer has come in it.

    Args:
        matcher: of the library.
        vocabulary: the number of token ids that the model knows.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def copy(self) -> Matcher:
        """The same, for another answer."""
        return Matcher(self._matcher.deep_copy(), self._vocabulary)

    def allowed(self) -> Tensor:
        """Which tokens may come next, (vocabulary), bool.

        Raises:
            GrammarError: a limit of the library was reached.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        places = torch.arange(8, dtype=torch.uint8)
        every = ((bits[:, None] >> places) & 1).flatten().bool()
        self._check()
        allowed = torch.zeros(self._vocabulary, dtype=torch.bool)
        count = min(len(every), self._vocabulary)
        allowed[:count] = every[:count]
        return allowed

    def take(self, token: int) -> None:
        """Go on with a token.

        Raises:
            GrammarError: it is not allowed.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {self._matcher.get_error()}")
