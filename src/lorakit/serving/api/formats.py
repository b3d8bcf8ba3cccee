"""Answers in the forms of OpenAI's two APIs of completions, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.serving.api.asking import Answer
from lorakit.serving.api.tool_calls import Calling, CallReader
from lorakit.serving.catalog import Chosen
from lorakit.serving.requests import Delta
from lorakit.serving.sampling import Token


class Form:
    """What is common to both: the head of each object, and how tokens are shown.

    Args:
        chosen: what answers.
        alternatives: how many of the likeliest tokens are shown beside each; None: no
            log-probability.
        prompt_logprobs: the same for the tokens of the prompt, in vLLM's form.
    """

    prefix = ""
    whole = ""
    chunk = ""

    def __init__(
        self, chosen: Chosen, *, alternatives: int | None, prompt_logprobs: int | None
    ) -> None:
        self._tokenizer = chosen.tokenizer
        self._alternatives = alternatives
        self._prompt_logprobs = prompt_logprobs
        self._texts: dict[int, str] = {}
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": chosen.name,
            "system_fingerprint": chosen.fingerprint,
        }

    def complete(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""
        choices = [self.choice(answer) for answer in answers]
        return self._head | {"object": self.whole, "choices": choices, "usage": usage}

    def event(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk of a stream."""
        return self._head | {"object": self.chunk, "choices": choices} | more

    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is over."""
        raise NotImplementedError

    def opening(self, answer: Answer) -> dict[str, Any] | None:
        """The chunk before an answer's first; None: there is none."""
        return None

    def step(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A chunk of an answer."""
        raise NotImplementedError

    def _ended(self, answer: Answer | Delta) -> dict[str, Any]:
        return {"finish_reason": answer.finish, "stop_reason": answer.stopped_by}

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = str(self._tokenizer.decode([token]))
        return self._texts[token]

    def _of_prompt(self, answer: Answer) -> list[dict[str, Any] | None]:
        """For each token of a prompt that token, and the likeliest in its place, by their ids."""
        return [None if token is None else self._ranked(token) for token in answer.prompt_tokens]

    def _ranked(self, token: Token) -> dict[str, Any]:
        assert token.logprob is not None
        own = (token.id, token.logprob)
        told = zip((own, *token.alternatives[: self._prompt_logprobs]), token.ranks, strict=False)
        return {
            str(id_): {"logprob": logprob, "rank": rank, "decoded_token": self._text(id_)}
            for (id_, logprob), rank in told
        }


class CompletionForm(Form):
    """The form of /v1/completions."""

    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def complete(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response, each choice with the log-probabilities of its prompt."""
        made = super().complete(answers, usage)
        if self._prompt_logprobs is not None:
            # The first answer to each prompt has them.
            firsts = {id(answer.request.prompt): answer for answer in reversed(answers)}
            told = {prompt: self._of_prompt(answer) for prompt, answer in firsts.items()}
            for choice, answer in zip(made["choices"], answers, strict=True):
                choice["prompt_logprobs"] = told[id(answer.request.prompt)]
        return made

    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is over, after its prompt where that is given back."""
        text = (answer.prompt or "") + answer.text
        return {
            "index": answer.index,
            "text": text,
            "logprobs": self._logprobs_of(answer, answer.tokens, answer.offsets, whole=True),
            **self._ended(answer),
        }

    def step(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A chunk of an answer; the first has the prompt, where that is given back."""
        first = len(answer.tokens) == len(delta.tokens)
        text = (answer.prompt or "") + delta.text if first else delta.text
        return {
            "index": answer.index,
            "text": text,
            "logprobs": self._logprobs_of(answer, delta.tokens, delta.offsets, whole=first),
            **self._ended(delta),
        }

    def _logprobs_of(
        self, answer: Answer, tokens: Sequence[Token], offsets: Sequence[int], *, whole: bool
    ) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        shift = len(answer.prompt or "")
        shown: list[Token | None] = list(tokens)
        places = [shift + offset for offset in offsets]
        names = [self._text(token.id) for token in tokens]
        if whole and answer.prompt is not None:
            prompt = answer.request.prompt
            shown = [*answer.prompt_tokens, *shown]
            before = [self._text(token) for token in prompt]
            starts = [len(self._joined(prompt[:at])) for at in range(len(prompt))]
            names, places = before + names, starts + places
        return {
            "tokens": names,
            "token_logprobs": [None if token is None else token.logprob for token in shown],
            "top_logprobs": [
                None if token is None else {self._text(t): v for t, v in self._with_own(token)}
                for token in shown
            ],
            "text_offset": places,
        }

    def _with_own(self, token: Token) -> list[tuple[int, float]]:
        """The likeliest tokens in a place, and the one that is there."""
        assert token.logprob is not None
        likeliest = dict(token.alternatives[: self._alternatives])
        return list((likeliest | {token.id: token.logprob}).items())

    def _joined(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class ChatForm(Form):
    """The form of /v1/chat/completions."""

    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        chosen: Chosen,
        *,
        alternatives: int | None,
        prompt_logprobs: int | None,
        calling: Calling | None = None,
    ) -> None:
        """Take also the tools that answers may call."""
        super().__init__(chosen, alternatives=alternatives, prompt_logprobs=prompt_logprobs)
        self._calling = calling
        self._readers: dict[int, CallReader] = {}

    def complete(self, answers: Sequence[Answer], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response, with the log-probabilities of the conversation."""
        made = super().complete(answers, usage)
        if self._prompt_logprobs is not None:
            made["prompt_logprobs"] = self._of_prompt(answers[0])
        return made

    def choice(self, answer: Answer) -> dict[str, Any]:
        """An answer that is over."""
        content: str = answer.text
        calls: list[dict[str, Any]] = []
        if self._calling is not None:
            content, calls = CallReader(self._calling).step(answer.text, over=True)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            calls = [{k: v for k, v in call.items() if k != "index"} for call in calls]
            message |= {"content": content or None, "tool_calls": calls}
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs_of(answer.tokens),
            **self._ended(answer, called=bool(calls)),
        }

    def opening(self, answer: Answer) -> dict[str, Any] | None:
        """The chunk that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def step(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """A chunk of an answer."""
        text, called, over = delta.text, False, delta.finish is not None
        calls: list[dict[str, Any]] = []
        if self._calling is not None:
            reader = self._readers.setdefault(answer.index, CallReader(self._calling))
            text, calls = reader.step(delta.text, over=over)
            called = reader.has_called
        content: dict[str, Any] = {"content": text} if text or not (calls or over) else {}
        return {
            "index": answer.index,
            "delta": content | ({"tool_calls": calls} if calls else {}),
            "logprobs": self._logprobs_of(delta.tokens),
            **self._ended(delta, called=called),
        }

    def _ended(self, answer: Answer | Delta, *, called: bool = False) -> dict[str, Any]:
        ended = super()._ended(answer)
        stopped = called and ended["finish_reason"] == "stop"
        return ended | {"finish_reason": "tool_calls"} if stopped else ended

    def _logprobs_of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        content = [
            self._shown(token.id, token.logprob)
            | {"top_logprobs": [self._shown(*other) for other in token.alternatives]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _shown(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """A prompt's text, where it was given as token ids."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
