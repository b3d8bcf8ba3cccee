"""The engine: one thread that owns the model, and answers many requests in one changing batch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.errors import ModelError
from lorakit.layers.route import Frame
from lorakit.routing.slot_content import Terms
from lorakit.serving.decoder import Decoder
from lorakit.serving.grammars import GrammarError
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.joint_steps import JointSteps
from lorakit.serving.kv_slots import KeyValueSlots, states_of
from lorakit.serving.pace import Pace
from lorakit.serving.prompt_reading import Prompt, PromptReader
from lorakit.serving.requests import Delta, Finish, Request
from lorakit.serving.rows import Row, broken_rows, chosen, latest, no_numbers
from lorakit.serving.sampling import Sampler, Token
from lorakit.serving.step_kinds import steps_of
from lorakit.serving.text import GrowingText
from lorakit.serving.worker import Limits, Worker, deliver

FULL = 0.75
"""The least share of a step's rows that are in use, or rows are moved."""


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
            dtype = adapter_dtype or model.dtype
            self._make_invariant(dtype)
        count, compiles = self.limits.slots, self.limits.compile != "off"
        self.slots = HeldSlots(
            model,
            count,
            dtype=dtype,
            few_ranks=compiles,
            virtual_tokens=True,
            most_rank=self.limits.slot_rank,
        )
        self.keys_and_values = KeyValueSlots(count, windows=compiles)
        self.steps = steps_of(
            self.decoder, self.slots, self.keys_and_values, compiles=compiles, note=note
        )
        self.pace = Pace()
        self.reader = PromptReader(
            self.decoder, self.slots, self.prefixes, self.pace, self.limits.prefill_tokens
        )
        self.joint = JointSteps(
            self.decoder, self.slots, self.keys_and_values, self.reader, self.pace, note=note
        )
        self._rows: dict[int, Row] = {}

    def _make_invariant(self, adapter_dtype: torch.dtype) -> None:
        """Have answers not depend on the batch, where that is wanted.

        Raises:
            ModelError: they do.
        """
        if not self.limits.batch_invariant:
            return
        reason = self.decoder.make_invariant()
        if adapter_dtype != self.model.dtype:
            reason = "A and B in another precision than the base's are not computed row by row"
        if reason is not None:
            raise ModelError(
                f"the answers of this {type(self.model).__name__} depend on their batch: {reason}; "
                "serve it without batch_invariant, or in another precision (bfloat16)"
            )

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
        joint = Counter({"with prompts": self.joint.count} if self.joint.count else {})
        return self.steps.counts + joint

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
        if not self._decode_and_read():
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
            sampler = Sampler(request.sampling, request.prompt, request.grammar)
            self._rows[slot] = Row(request, slot, sampler, text, Prompt(request, slot))

    def _decode_and_read(self) -> bool:
        """One token more for each answer and parts of prompts, in one pass; False: not so."""
        rows, prompts = self._answering(), self._unread()
        if not (rows and prompts):
            return False
        self._close_gaps(rows)
        found = self.joint.step(latest(rows), [row.slot for row in rows], prompts)
        if found is None:
            return False
        self.keys_and_values.end()
        self._go_on(rows, found.logits)
        for prompt, logits in found.read:
            row = self._rows[prompt.slot]
            try:
                self._begin(row, prompt, logits)
            except Exception as error:
                self._end(row, Delta(finish="error", error=error))
        return True

    def _unread(self) -> list[Prompt]:
        """The prompts that are not in their slots."""
        return [row.prompt for row in self._rows.values() if row.prompt is not None]

    def _answering(self) -> list[Row]:
        """The rows whose answers have begun."""
        return [row for row in self._rows.values() if row.prompt is None]

    def _read_prompts(self) -> None:
        """Read as much of the prompts as one step may, and begin the answers of those read."""
        prompts = self._unread()
        beside = len(prompts) < len(self._rows)
        for prompt, found in self.reader.read(prompts, beside=beside):
            row = self._rows[prompt.slot]
            try:
                if isinstance(found, Exception):
                    raise found
                self._begin(row, prompt, found)
            except Exception as error:
                self._end(row, Delta(finish="error", error=error))

    def _begin(self, row: Row, prompt: Prompt, logits: Tensor) -> None:
        """Begin the answer to a prompt, whose last token has these logits.

        Raises:
            RefusalError: they are no numbers.
        """
        request, states = row.request, states_of(prompt.cache)
        if broken_rows(logits[None]):
            self._spoil(row.slot)
            raise no_numbers(request, logits.dtype)
        first = Delta(
            prompt_tokens=None if prompt.tokens is None else tuple(prompt.tokens),
            cached_tokens=prompt.cached,
        )
        # What the next step needs comes after the first token, which somebody waits for.
        if request.max_tokens == 0:
            self._end(row, replace(first, finish="length"))
        else:
            self._take(row, row.sampler.choose(logits), first)
        self.prefixes.keep(request.use, request.ids, states)
        if row.slot in self._rows:
            self.keys_and_values.admit(row.slot, prompt.cache)
            row.prompt = None

    def _close_gaps(self, rows: Sequence[Row]) -> None:
        """Have answers use the lowest slots, where a step would compute many that are free."""
        used = 1 + max(row.slot for row in rows)
        if len(rows) >= FULL * used:
            return
        free = [slot for slot in range(used) if slot not in self._rows]
        for row in sorted(rows, key=lambda row: row.slot, reverse=True):
            if not free or free[0] > row.slot:
                return
            try:
                self.slots.hold(free[0], row.request.use)
            except Exception:
                # It goes on where it is.
                return
            slot = free.pop(0)
            self.keys_and_values.move(row.slot, slot)
            self._rows[slot] = self._rows.pop(row.slot)
            row.slot = slot

    def _decode(self) -> None:
        """One token more for each answer."""
        rows = self._answering()
        if not rows:
            return
        self._close_gaps(rows)
        tokens = latest(rows)
        begun = time.perf_counter()
        try:
            logits = self.steps.step(tokens, [row.slot for row in rows])
            # A GPU has not computed what nobody asks for.
            float(logits[0, 0])
        except Exception as error:
            for row in rows:
                self._end(row, Delta(finish="error", error=error))
            return
        self.pace.stepped(len(tokens), time.perf_counter() - begun)
        self.keys_and_values.end()
        self._go_on(rows, logits)

    def _go_on(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Go on with the next token of each answer.

        Args:
            rows: the answers.
            logits: of all slots, (rows, vocabulary).
        """
        rows = self._sound(rows, logits)
        try:
            tokens = chosen(rows, logits)
        except Exception as error:
            for row in rows:
                self._end(row, Delta(finish="error", error=error))
            return
        for row, token in zip(rows, tokens, strict=True):
            if isinstance(token, GrammarError):
                self._end(row, Delta(finish="error", error=token))
            else:
                self._take(row, token, Delta())

    def _sound(self, rows: Sequence[Row], logits: Tensor) -> Sequence[Row]:
        """The answers whose logits are numbers; the others end, and leave nothing behind."""
        broken = broken_rows(logits)
        for slot in broken:
            self._spoil(slot)
        for row in rows:
            if row.slot in broken:
                self._end(row, Delta(finish="error", error=no_numbers(row.request, logits.dtype)))
        return [row for row in rows if row.slot not in broken] if broken else rows

    def _spoil(self, slot: int) -> None:
        """Have nothing that a slot holds reach the next request in it."""
        self.slots.spoil(slot)
        self.keys_and_values.spoil(slot)

    def _take(self, row: Row, token: Token, told: Delta) -> None:
        """Go on with a token: tell the request, and end its answer where it ends.

        Args:
            row: the request in its slot.
            token: its next one.
            told: what else the request is told.
        """
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
        delta = replace(
            told,
            text=text,
            tokens=(token,),
            offsets=(offset,),
            finish=finish,
            stopped_by=stopped_by,
        )
        if finish is not None:
            self._keep_read(row)
            self._end(row, replace(delta, text=text + row.text.end()))
        elif not deliver(request, delta):
            self._end(row, Delta(finish="cancelled"))

    def _keep_read(self, row: Row) -> None:
        """Keep what was read of a conversation: its next turn goes on from there."""
        if self.prefixes.has_room and row.prompt is None and row.count > 1:
            read = [*row.request.ids, *row.ids[:-1]]
            self.prefixes.keep(row.request.use, read, self.keys_and_values.copied(row.slot))

    def _end(self, row: Row, delta: Delta) -> None:
        """Free a row's slot, and tell its request why."""
        self._rows.pop(row.slot, None)
        self.keys_and_values.free(row.slot)
        deliver(row.request, delta)
