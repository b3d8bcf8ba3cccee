"""What is asked of the engine, and what it answers."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.bank import Held
from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.layers.operation import Update
from lorakit.serving.grammars import Matcher
from lorakit.serving.sampling import Sampling, Token

Finish = Literal["stop", "length", "cancelled", "error"]
Goal = Literal["text", "embedding", "classes"]

_numbers = itertools.count()


@dataclass(frozen=True)
class Use:
    """The weights that answer a request: adapters, as they were when it was accepted."""

    adapters: tuple[tuple[Held, float], ...] = ()
    """With their weights; none: the base."""

    @property
    def terms(self) -> list[tuple[Mapping[int, Update], float]]:
        """The updates and their weights."""
        return [(held.updates, weight) for held, weight in self.adapters]

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(held.name for held, _ in self.adapters)

    @cached_property
    def key(self) -> str:
        """The same for the same weights: of content, never of names."""
        return key_of([(h.content_hash or str(id(h.updates)), w) for h, w in self.adapters])

    @cached_property
    def virtual_tokens(self) -> VirtualTokens | None:
        """Those that prompts get, where the adapter has some."""
        every = (update for held, _ in self.adapters for update in held.updates.values())
        return next((u.virtual_tokens for u in every if u.virtual_tokens), None)

    @property
    def is_known(self) -> bool:
        """Whether all its weights are told apart by their content."""
        return all(held.content_hash for held, _ in self.adapters)

    def fingerprint(self, base: str) -> str:
        """What an answer of these weights on a base carries, to tell it from those of others."""
        return fingerprint_of(base, self.key)


def key_of(adapters: Sequence[tuple[str, float]]) -> str:
    """The same for the same content hashes and weights of adapters, in whichever order."""
    return "+".join(sorted(f"{content_hash}*{weight!r}" for content_hash, weight in adapters))


def fingerprint_of(base: str, key: str) -> str:
    """What tells the answers of a base and the weights of a key from those of others."""
    return f"fp_{hashlib.sha256(f'{base} {key}'.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Delta:
    """A step of an answer."""

    text: str = ""
    """What is new of the text."""
    tokens: tuple[Token, ...] = ()
    """What is new of the tokens."""
    offsets: tuple[int, ...] = ()
    """Where each token's text begins in the answer, in characters."""
    prompt_tokens: tuple[Token | None, ...] | None = None
    """In the first delta, where they were asked for: the prompt's own, None for the first."""
    cached_tokens: int = 0
    """In the first delta, the prompt's tokens that were read before."""
    output: Tensor | None = None
    """What an encoder gives: the embedding, or the logits of the classes."""
    finish: Finish | None = None
    """Why this is the last one; None: it is not."""
    stopped_by: str | int | None = None
    """The stop text or the stop token that ended the answer; None: the model's own end."""
    error: Exception | None = None
    """What went wrong, where `finish` says so."""


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt to answer."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    use: Use
    tokenizer: PreTrainedTokenizerBase
    """With which the answer becomes text."""
    deliver: Callable[[Delta], None]
    """Called in the engine's thread with each step of the answer; must not wait."""
    max_tokens: int = 0
    """The most tokens of the answer; 0: the prompt is read alone."""
    goal: Goal = "text"
    """What is wanted: text of a decoder, or an output of an encoder."""
    token_types: Sequence[int] = ()
    """Which text of a pair each token is from, for an encoder with token types."""
    sampling: Sampling = field(default_factory=Sampling)
    grammar: Matcher | None = None
    """What the answer must be, at its beginning; None: anything."""
    ends: frozenset[int] = frozenset()
    """The tokens that end the answer, and are not in its text."""
    stop_tokens: frozenset[int] = frozenset()
    """Those that the request names beside them."""
    stops: tuple[str, ...] = ()
    """The texts that end it."""
    include_stop: bool = False
    skip_special: bool = True
    prompt_logprobs: int | None = None
    """How many alternatives are reported with each token of the prompt; None: no token is."""
    client: str = ""
    """Who asks, as far as turns in the queue go: the same for the same key."""
    number: int = field(default_factory=lambda: next(_numbers))
    arrived: float = field(default_factory=time.monotonic)
    """By the monotonic clock, in seconds."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @cached_property
    def ids(self) -> Sequence[int]:
        """The prompt as the model reads it, with the adapter's virtual tokens if it has any."""
        own, prompt = self.use.virtual_tokens, self.prompt
        if own is None:
            return prompt
        order = own.order(len(prompt), len(prompt))
        return [own.first + ~at if at < 0 else prompt[at] for at in order]

    def cancel(self) -> None:
        """Have the engine stop answering within two steps; from any thread."""
        self.cancelled.set()
