"""The engine: one thread that owns the model, and answers many requests in one changing batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.layers.route import Frame
from lorakit.models.shape import context_length
from lorakit.routing.slots import Slots
from lorakit.serving.admission import ClosedError, Queue
from lorakit.serving.decoder import Decoder
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.requests import Delta, Finish, Request
from lorakit.serving.sampling import Sampler, Token, reported
from lorakit.serving.text import GrowingText


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much an engine does at once."""

    slots: int = 16
    """The most requests that are answered at once."""
    max_length: int | None = None
    """The most tokens of prompt and answer; None: the model's context."""
    prefill_tokens: int = 256
    """The most tokens of prompts that are read between two steps of the answers."""
    waiting_requests: int = 256
    """The most requests that wait for a slot."""
    waiting_tokens: int = 1_000_000
    """The most tokens of their prompts and answers."""


@dataclass(eq=False)
class Row:
    """A request in its slot."""

    request: Request
    slot: int
    sampler: Sampler
    text: GrowingText
    cache: DynamicCache | None = field(default_factory=DynamicCache)
    """What was read of the prompt; None once it is in the slot."""
    read: int = 0
    """The tokens of the prompt that were read."""
    last: int = 0
    """The latest token, which the next step reads."""
    count: int = 0
    """The tokens of the answer."""
    prompt_tokens: list[Token | None] | None = None
    """The prompt's tokens with log-probabilities, where they are asked for."""


class Engine:
    """Answers requests with a base and adapters; rows join and leave between any two steps.

    Args:
        model: a causal language model; nobody else may call it while the engine runs.
        limits: how much it does at once.
        adapter_dtype: of A and B in the slots; None: the base's precision.

    Raises:
        ModelError: the model can't be served.

    Examples:
        >>> engine = Engine(model)  # doctest: +SKIP
        >>> engine.start()  # doctest: +SKIP
        >>> engine.submit([request])  # doctest: +SKIP
        >>> engine.close()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.model = model.eval()
        context = context_length(model)
        asked = self.limits.max_length
        self.max_length = min(x for x in (context, asked, 2**31) if x is not None)
        """The most tokens of prompt and answer."""
        self.queue = Queue(self.limits.waiting_requests, self.limits.waiting_tokens)
        self._decoder = Decoder(model)
        with attachment_for(model).route.own.pushed(Frame()):
            self._decoder.prove()
        self.slots = Slots(model, self.limits.slots, dtype=adapter_dtype or model.dtype)
        self._held: list[str | None] = [""] * self.limits.slots
        """By slot, the key of what it holds; None: unknown, after an error."""
        self.keys_and_values = KeyValueSlots(self.limits.slots)
        self._rows: dict[int, Row] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorakit-engine", daemon=True)

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows."""
        return self._decoder.vocabulary

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Have requests answered, all or none; each is told by its `deliver`.

        Raises:
            QueueFullError: there is no room for them.
            ClosedError: the engine is about to end.
        """
        with self._wake:
            if self._closing:
                raise ClosedError("the server is about to end: ask another, or again later")
            self.queue.put(requests)
            self._wake.notify()

    def wake(self) -> None:
        """Have the engine look for requests that were cancelled."""
        with self._wake:
            self._wake.notify()

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once.

        Returns:
            Whether the engine has ended.
        """
        with self._wake:
            self._closing = True
            if not drain:
                for request in (*self.queue.waiting(), *self.running()):
                    request.cancel()
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_closing(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def running(self) -> list[Request]:
        """The requests that have a slot."""
        return [row.request for row in list(self._rows.values())]

    def _run(self) -> None:
        with torch.no_grad():
            while True:
                with self._wake:
                    while not (self._rows or len(self.queue)):
                        if self._closing:
                            return
                        self._wake.wait()
                try:
                    self._step()
                except Exception as error:
                    for row in list(self._rows.values()):
                        self._end(row, Delta(finish="error", error=error))

    def _step(self) -> None:
        self._drop_cancelled()
        self._join_waiting()
        self._read_prompts()
        self._decode()

    def _drop_cancelled(self) -> None:
        gone = [each for each in self.queue.waiting() if each.cancelled.is_set()]
        if gone:
            self.queue.remove(gone)
            for request in gone:
                _deliver(request, Delta(finish="cancelled"))
        for row in list(self._rows.values()):
            if row.request.cancelled.is_set():
                self._end(row, Delta(finish="cancelled"))

    def _join_waiting(self) -> None:
        """Give free slots to those that wait."""
        while len(self._rows) < self.limits.slots:
            request = self.queue.take()
            if request is None:
                return
            slot = self._slot_for(request.use.key)
            if not self._written(slot, request):
                continue
            stops = request.stops
            text = GrowingText(
                request.tokenizer,
                stops,
                include_stop=request.include_stop,
                skip_special=request.skip_special,
            )
            row = Row(request, slot, Sampler(request.sampling, request.prompt), text)
            if request.prompt_logprobs is not None:
                row.prompt_tokens = [None]
            self._rows[slot] = row

    def _slot_for(self, key: str) -> int:
        """A free slot: one that holds these adapters already, or the lowest, since a step
        computes all slots up to the highest in use."""
        free = [slot for slot in range(self.limits.slots) if slot not in self._rows]
        near = [slot for slot in free if slot <= len(self._rows)]
        return next((slot for slot in near if self._held[slot] == key), free[0])

    def _written(self, slot: int, request: Request) -> bool:
        """Have a slot hold what a request uses; False: it cannot, and the request was told."""
        if self._held[slot] == request.use.key:
            return True
        self._held[slot] = None
        try:
            self.slots.join(slot, request.use.terms)
        except Exception as error:
            _deliver(request, Delta(finish="error", error=error))
            return False
        self._held[slot] = request.use.key
        return True

    def _read_prompts(self) -> None:
        """Read as much of the prompts as one step may, the oldest first."""
        room = self.limits.prefill_tokens
        reading = [row for row in self._rows.values() if row.cache is not None]
        for row in sorted(reading, key=lambda row: row.request.number):
            if room <= 0:
                return
            try:
                room -= self._read_prompt(row, room)
            except Exception as error:
                self._end(row, Delta(finish="error", error=error))

    def _read_prompt(self, row: Row, room: int) -> int:
        """Read at most so many tokens of a prompt; after its last, the answer begins."""
        request, cache = row.request, row.cache
        assert cache is not None
        ids = list(request.prompt[row.read : row.read + room])
        with self.slots.used(row.slot, row.slot + 1):
            logits = self._decoder.read(ids, cache, every=row.prompt_tokens is not None)
        row.read += len(ids)
        if row.prompt_tokens is not None:
            following = request.prompt[row.read - len(ids) + 1 : row.read + 1]
            row.prompt_tokens += [
                reported(own, token, request.prompt_logprobs)
                for own, token in zip(logits, following, strict=False)
            ]
        if row.read < len(request.prompt):
            return len(ids)
        if request.max_tokens == 0:
            tokens = None if row.prompt_tokens is None else tuple(row.prompt_tokens)
            self._end(row, Delta(prompt_tokens=tokens, finish="length"))
            return len(ids)
        self.keys_and_values.admit(row.slot, cache)
        row.cache = None
        self._take(row, row.sampler.choose(logits[-1]))
        return len(ids)

    def _decode(self) -> None:
        """One token more for each answer."""
        rows = [row for row in self._rows.values() if row.cache is None]
        if not rows:
            return
        count = 1 + max(row.slot for row in rows)
        tokens = [0] * count
        for row in rows:
            tokens[row.slot] = row.last
        try:
            with self.slots.used(0, count):
                logits = self._decoder.step(tokens, self.keys_and_values)
            self.keys_and_values.end()
            chosen = _chosen(rows, logits)
        except Exception as error:
            for row in rows:
                self._end(row, Delta(finish="error", error=error))
            return
        for row, token in zip(rows, chosen, strict=True):
            self._take(row, token)

    def _take(self, row: Row, token: Token) -> None:
        """Go on with a token: tell the request, and end its answer where it ends."""
        request = row.request
        row.last, row.count = token.id, row.count + 1
        offset, text = row.text.length, ""
        finish: Finish | None = None
        stopped_by: str | int | None = None
        if token.id in request.ends:
            finish = "stop"
        elif token.id in request.stop_tokens:
            finish, stopped_by = "stop", token.id
        else:
            text = row.text.add(token.id)
            if row.text.stopped is not None:
                finish, stopped_by = "stop", row.text.stopped
            elif row.count >= request.max_tokens:
                finish = "length"
        delta = Delta(text, (token,), (offset,), finish=finish, stopped_by=stopped_by)
        if row.prompt_tokens is not None:
            delta = replace(delta, prompt_tokens=tuple(row.prompt_tokens))
            row.prompt_tokens = None
        if finish is not None:
            self._end(row, replace(delta, text=text + row.text.end()))
        elif not _deliver(request, delta):
            self._end(row, Delta(finish="cancelled"))

    def _end(self, row: Row, delta: Delta) -> None:
        """Free a row's slot, and tell its request why."""
        self._rows.pop(row.slot, None)
        self.keys_and_values.free(row.slot)
        _deliver(row.request, delta)


def _chosen(rows: Iterable[Row], logits: Tensor) -> list[Token]:
    """The next token of each row; logits are those of all slots."""
    likeliest: list[int] = []
    found = []
    for row in rows:
        if not row.sampler.is_plain:
            found.append(row.sampler.choose(logits[row.slot]))
            continue
        likeliest = likeliest or logits.argmax(-1).tolist()
        found.append(row.sampler.chosen(logits[row.slot], likeliest[row.slot]))
    return found


def _deliver(request: Request, delta: Delta) -> bool:
    """Tell a request; False: nobody hears it any more."""
    tell: Callable[[Delta], None] = request.deliver
    try:
        tell(delta)
    except Exception:
        # The loop of the one who asked may have ended, which is no reason for others to wait.
        return False
    return True
