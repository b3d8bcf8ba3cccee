"""The engine: one thread that owns the model, and answers many requests in one changing batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.layers.route import Frame
from lorakit.routing.slots import Terms
from lorakit.serving.decoder import Decoder
from lorakit.serving.grammars import GrammarError
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots, states_of
from lorakit.serving.requests import Delta, Finish, Request
from lorakit.serving.sampling import Sampler, Token, reported
from lorakit.serving.steps import steps_of
from lorakit.serving.text import GrowingText
from lorakit.serving.worker import Limits, Worker, deliver


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
    cached: int = 0
    """Those of them that were read before, for another request."""
    ids: list[int] = field(default_factory=list)
    """The tokens of the answer."""
    last: int = 0
    """The latest token, which the next step reads."""
    count: int = 0
    """The tokens of the answer."""
    prompt_tokens: list[Token | None] | None = None
    """The prompt's tokens with log-probabilities, where they are asked for."""


class Engine(Worker):
    """Answers requests with a base and adapters; rows join and leave between any two steps.

    Args:
        model: a causal language model; nobody else may call it while the engine runs.
        limits: how much it does at once.
        adapter_dtype: of A and B in the slots; None: the base's precision.
        note: is told why steps can't be compiled.

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
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(model, limits)
        self.decoder = Decoder(model)
        with attachment_for(model).route.own.pushed(Frame()):
            self.decoder.prove()
        count, compiles = self.limits.slots, self.limits.compile != "off"
        dtype = adapter_dtype or model.dtype
        self.slots = HeldSlots(model, count, dtype=dtype, few_ranks=compiles)
        self.keys_and_values = KeyValueSlots(count, windows=compiles)
        self.steps = steps_of(
            self.decoder, self.slots, self.keys_and_values, compiles=compiles, note=note
        )
        self._rows: dict[int, Row] = {}

    def warm_up(self, terms: Iterable[Terms] = ()) -> None:
        """Reserve slots for what rows will use, and wait for compiled steps if that was asked."""
        if self.limits.compile == "off":
            return
        waits, count = self.limits.compile == "wait", self.slots.count
        for number, each in enumerate(terms):
            self.slots.reserve(each)
            # Compiled steps are compared with eager ones on what they will compute.
            if waits and number < count:
                self.slots.join(number, each)
                if self.slots.has_others([number]):
                    self.slots.join(number, ())
        if waits:
            self.steps.warm_up()
            for slot in range(count):
                self.slots.join(slot, ())

    @property
    def step_counts(self) -> Counter[str]:
        """The decode steps so far: compiled, or the reason why they were eager."""
        return self.steps.counts

    def close(self, *, drain: bool = True, timeout_s: float | None = None) -> bool:
        """Take no more requests, and end once those that came are answered, or at once.

        Returns:
            Whether the engine has ended.
        """
        self.steps.close()
        return super().close(drain=drain, timeout_s=timeout_s)

    def running(self) -> list[Request]:
        """The requests that have a slot."""
        return [row.request for row in list(self._rows.values())]

    @property
    def used_share(self) -> float:
        """The share of the tokens that slots may hold."""
        return sum(self.keys_and_values.lengths) / (self.limits.slots * self.max_length)

    def _fail(self, error: Exception) -> None:
        for row in list(self._rows.values()):
            self._end(row, Delta(finish="error", error=error))

    def _step(self) -> None:
        self._drop_cancelled()
        self._join_waiting()
        self._read_prompts()
        self._decode()

    def _drop_cancelled(self) -> None:
        super()._drop_cancelled()
        for row in list(self._rows.values()):
            if row.request.cancelled.is_set():
                self._end(row, Delta(finish="cancelled"))

    def _join_waiting(self) -> None:
        """Give free slots to those that wait."""
        while len(self._rows) < self.limits.slots:
            request = self.queue.take()
            if request is None:
                return
            slot = self.slots.place(request.use, self._rows)
            try:
                self.slots.hold(slot, request.use)
            except Exception as error:
                deliver(request, Delta(finish="error", error=error))
                continue
            stops = request.stops
            text = GrowingText(
                request.tokenizer,
                stops,
                include_stop=request.include_stop,
                skip_special=request.skip_special,
            )
            row = Row(
                request, slot, Sampler(request.sampling, request.prompt, request.grammar), text
            )
            if request.prompt_logprobs is not None:
                row.prompt_tokens = [None]
            self._rows[slot] = row

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
        if row.read == 0 and row.prompt_tokens is None:
            # Only now, since a request that came together with this one may have read it.
            row.read, cache = self.prefixes.start(request.use, request.prompt)
            row.cached, row.cache = row.read, cache
        ids = list(request.prompt[row.read : row.read + room])
        with self.slots.used(row.slot, row.slot + 1):
            logits = self.decoder.read(ids, cache, every=row.prompt_tokens is not None)
        row.read += len(ids)
        if row.prompt_tokens is not None:
            following = request.prompt[row.read - len(ids) + 1 : row.read + 1]
            row.prompt_tokens += [
                reported(own, token, request.prompt_logprobs)
                for own, token in zip(logits, following, strict=False)
            ]
        if row.read < len(request.prompt):
            return len(ids)
        self.prefixes.keep(request.use, request.prompt, states_of(cache))
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
            logits = self.steps.step(tokens, [row.slot for row in rows])
            self.keys_and_values.end()
            chosen = _chosen(rows, logits)
        except Exception as error:
            for row in rows:
                self._end(row, Delta(finish="error", error=error))
            return
        for row, token in zip(rows, chosen, strict=True):
            if isinstance(token, GrammarError):
                self._end(row, Delta(finish="error", error=token))
            else:
                self._take(row, token)

    def _take(self, row: Row, token: Token) -> None:
        """Go on with a token: tell the request, and end its answer where it ends."""
        request = row.request
        row.last, row.count = token.id, row.count + 1
        row.ids.append(token.id)
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
            elif row.sampler.is_over:
                finish = "stop"
            elif row.count >= request.max_tokens:
                finish = "length"
        delta = Delta(text, (token,), (offset,), finish=finish, stopped_by=stopped_by)
        if row.count == 1:
            delta = replace(delta, cached_tokens=row.cached)
        if row.prompt_tokens is not None:
            delta = replace(delta, prompt_tokens=tuple(row.prompt_tokens))
            row.prompt_tokens = None
        if finish is not None:
            self._keep_read(row)
            self._end(row, replace(delta, text=text + row.text.end()))
        elif not deliver(request, delta):
            self._end(row, Delta(finish="cancelled"))

    def _keep_read(self, row: Row) -> None:
        """Keep what was read of a conversation: its next turn goes on from there."""
        if self.prefixes.has_room and row.cache is None and row.count > 1:
            read = [*row.request.prompt, *row.ids[:-1]]
            self.prefixes.keep(row.request.use, read, self.keys_and_values.copied(row.slot))

    def _end(self, row: Row, delta: Delta) -> None:
        """Free a row's slot, and tell its request why."""
        self._rows.pop(row.slot, None)
        self.keys_and_values.free(row.slot)
        deliver(row.request, delta)


def _chosen(rows: Iterable[Row], logits: Tensor) -> list[Token | GrammarError]:
    """The next token of each row, or why it has none; logits are those of all slots."""
    likeliest: list[int] = []
    found: list[Token | GrammarError] = []
    for row in rows:
        if not row.sampler.is_plain:
            try:
                found.append(row.sampler.choose(logits[row.slot]))
            except GrammarError as error:
                found.append(error)
            continue
        likeliest = likeliest or logits.argmax(-1).tolist()
        found.append(row.sampler.chosen(logits[row.slot], likeliest[row.slot]))
    return found
