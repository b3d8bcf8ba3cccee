"""What encoders answer: embeddings and classes of texts."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from lorakit.serving.api.answering import finished
from lorakit.serving.api.asking import Answering, check_ids
from lorakit.serving.api.bodies import (
    MOST_INPUTS,
    Addressed,
    ClassifyBody,
    EmbeddingsBody,
    EncodedBody,
    Input,
    Pair,
)
from lorakit.serving.api.metrics import Metrics
from lorakit.serving.catalog import EMBEDDING, Chosen, Head
from lorakit.serving.refusals import RefusalError
from lorakit.serving.requests import Delta, Goal, Request
from lorakit.serving.worker import Worker


class Encoding:
    """The answers of an engine of encoders.

    Args:
        engine: that is to answer.
        choose: says which weights a body names.
        metrics: where requests are counted.
    """

    def __init__(
        self,
        engine: Worker,
        choose: Callable[[Addressed, HttpRequest], Chosen],
        metrics: Metrics,
    ) -> None:
        self._engine, self._choose = engine, choose
        self._metrics = metrics

    async def embeddings(self, body: EmbeddingsBody, http: HttpRequest) -> Response:
        """The embeddings of texts, each of length 1."""
        chosen, rows, asked = await self._rows(body, http, "embedding")
        width = len(rows[0])
        if body.dimensions not in (None, width):
            raise RefusalError(
                f"dimensions is {body.dimensions}, and the model's embeddings have {width}",
                param="dimensions",
            )
        form: Callable[[Tensor], Any] = Tensor.tolist
        if body.encoding_format == "base64":
            form = _in_base64
        data = [
            {"object": "embedding", "index": index, "embedding": form(row)}
            for index, row in enumerate(rows)
        ]
        return JSONResponse(_head(chosen, "embd", asked) | {"data": data})

    async def classify(self, body: ClassifyBody, http: HttpRequest) -> Response:
        """The classes of texts, and their probabilities."""
        chosen, rows, asked = await self._rows(body, http, "classes")
        head = _head_of(chosen)
        data = [{"index": index} | _classified(row, head) for index, row in enumerate(rows)]
        return JSONResponse(_head(chosen, "classify", asked) | {"data": data})

    async def _rows(
        self, body: EncodedBody, http: HttpRequest, goal: Goal
    ) -> tuple[Chosen, list[Tensor], int]:
        """What answers, its output for each input, and the number of tokens."""

        def prepare() -> tuple[Chosen, list[Request]]:
            chosen = self._choose(body, http)
            if not self._engine.encodes:
                raise RefusalError(
                    f"{chosen.name} writes text, and gives no "
                    f"{'embeddings' if goal == 'embedding' else 'classes'}: start a server with an "
                    "encoder, such as --model minilm",
                    param="model",
                )
            _check_tasks(chosen, goal)
            if goal == "classes":
                _head_of(chosen)
            return chosen, self._requests(body, chosen, goal, client=http.state.rights.client)

        chosen, requests = await run_in_threadpool(prepare)
        rows: list[Tensor] = []
        most = max(1, self._engine.limits.waiting_requests // 4)
        # In parts, so that a long list neither fills the queue nor is too long for it.
        for start in range(0, len(requests), most):
            part = requests[start : start + most]
            answering = Answering(self._engine, part, chosen, self._metrics)
            answering.submit()
            await finished(http, answering)
            rows += [each.output for each in answering.answers if each.output is not None]
        return chosen, rows, sum(len(each.prompt) for each in requests)

    def _requests(
        self, body: EncodedBody, chosen: Chosen, goal: Goal, *, client: str
    ) -> list[Request]:
        """The requests of a body, one for each input.

        Raises:
            RefusalError: an input is empty or too long, or a token is not known.
        """
        inputs = _inputs(body.input)
        if not 0 < len(inputs) <= MOST_INPUTS:
            raise RefusalError(
                f"input has {len(inputs):,} texts: give 1 to {MOST_INPUTS:,}", param="input"
            )
        cut = body.truncate_prompt_tokens
        room = self._engine.max_length
        length = None if cut is None else room if cut == -1 else min(cut, room)
        made = []
        for each in inputs:
            ids, types = _tokens(chosen, each, length)
            self._check_ids(ids)
            request = Request(
                prompt=ids,
                use=chosen.use,
                tokenizer=chosen.tokenizer,
                deliver=_undelivered,
                goal=goal,
                client=client,
                token_types=types,
            )
            made.append(request)
        return made

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise RefusalError("an input has no tokens: give at least one", param="input")
        if len(ids) > self._engine.max_length:
            raise RefusalError(
                f"This model's maximum context length is {self._engine.max_length} tokens, and an "
                f"input has {len(ids)}: make it shorter, or give truncate_prompt_tokens",
                param="input",
            )
        check_ids(ids, self._engine.vocabulary, "input")


def _undelivered(delta: Delta) -> None:
    raise AssertionError("nobody listens yet")


def _inputs(given: Input) -> list[str | Pair | list[int]]:
    alone = isinstance(given, str | Pair) or (given and isinstance(given[0], int))
    return cast(list[str | Pair | list[int]], [given] if alone else given)


def _tokens(
    chosen: Chosen, given: str | Pair | list[int], length: int | None
) -> tuple[list[int], list[int]]:
    """The tokens of an input and which text each is from, of at most so many; as in training."""
    if isinstance(given, list):
        return given[:length], []
    pair = given if isinstance(given, Pair) else Pair(text=given)
    cut = {} if length is None else {"truncation": True, "max_length": length}
    tokenizer: Any = chosen.tokenizer
    found = tokenizer(pair.text, pair.text_pair, verbose=False, **cut)
    return list(found["input_ids"]), list(found.get("token_type_ids") or ())


def _check_tasks(chosen: Chosen, goal: Goal) -> None:
    """Make sure that what is asked of adapters is what they were trained for.

    Raises:
        RefusalError: one was trained for the other.
    """
    for name, task in chosen.tasks.items():
        if (task == EMBEDDING) != (goal == "embedding"):
            other = "/v1/embeddings" if task == EMBEDDING else "/v1/classify"
            what = "embeddings" if goal == "embedding" else "classes"
            raise RefusalError(
                f"{name} was trained for {task}, and gives no {what}: ask {other}", param="model"
            )


def _head_of(chosen: Chosen) -> Head:
    """The one head that classes are from.

    Raises:
        RefusalError: the weights have none, or several that do not belong together.
    """
    heads = dict.fromkeys(chosen.heads)
    if len(heads) > 1:
        raise RefusalError(
            f"{', '.join(chosen.use.names)} do not have the same classes, so that they can't be "
            "combined",
            param="adapters",
        )
    head = next(iter(heads), None)
    if head is None:
        raise RefusalError(
            f"{chosen.name} has no trained head: name an adapter that was trained to classify",
            param="model",
        )
    return head


def _classified(logits: Tensor, head: Head) -> dict[str, Any]:
    """What a head says of one input."""
    if head.task == "regression":
        return {"label": None, "value": float(logits[0]), "probs": [], "num_classes": 1}
    # Beside rows with more classes, the rest is minus infinity.
    own = logits[: len(head.labels)] if head.labels else logits[logits > float("-inf")]
    probabilities = own.sigmoid() if head.task == "multi-label" else own.softmax(-1)
    labels = head.labels or [f"LABEL_{number}" for number in range(len(own))]
    return {
        "label": labels[int(own.argmax())],
        "probs": probabilities.tolist(),
        "labels": list(labels),
        "num_classes": len(own),
    }


def _in_base64(row: Tensor) -> str:
    numbers = row.to(torch.float32).tolist()
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def _head(chosen: Chosen, prefix: str, asked: int) -> dict[str, Any]:
    """What every answer begins with."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": chosen.name,
        "system_fingerprint": chosen.fingerprint,
        "usage": {"prompt_tokens": asked, "total_tokens": asked},
    }
