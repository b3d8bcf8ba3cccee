"""The engine of encoders: embeddings and classes of many texts in one batch, each with its own
adapters and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorakit.attachment.state import attachment_for
from lorakit.errors import ModelError
from lorakit.layers.route import Frame
from lorakit.serving.decoder import CLOSE, CLOSE_HALF
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.pooling import pooled, way_of
from lorakit.serving.requests import Delta, Request
from lorakit.serving.rows import broken_rows, no_numbers
from lorakit.serving.worker import Limits, Worker, deliver


class EncoderEngine(Worker):
    """Answers with a model that reads a text at once: a batch is what waits, and ends together.

    Args:
        model: with a head for classes, trained or not, or with none at all; nobody else may call it
            while the engine runs.
        limits: how much it does at once.
        adapter_dtype: of A and B in the slots; None: the base's precision.

    Raises:
        ModelError: the model can't be served.
    """

    encodes = True

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits | None = None,
        *,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, limits)
        self._batch: list[Request] = []
        self._way = way_of(model)
        with attachment_for(model).route.own.pushed(Frame()):
            self._prove()
        self.slots = HeldSlots(
            model,
            self.limits.slots,
            dtype=adapter_dtype or model.dtype,
            most_rank=self.limits.slot_rank,
        )

    def running(self) -> list[Request]:
        """The requests of the batch that is computed."""
        return list(self._batch)

    def _fail(self, error: Exception) -> None:
        self._tell(dict.fromkeys(self._batch, Delta(finish="error", error=error)))

    def _step(self) -> None:
        self._drop_cancelled()
        rows = self._joined()
        if not rows:
            return
        count = 1 + max(rows)
        nothing: Sequence[int] = (0,)
        prompts = [rows[slot].prompt if slot in rows else nothing for slot in range(count)]
        pairs = [rows[slot].token_types if slot in rows else () for slot in range(count)]
        with self.slots.used(0, count):
            logits, embeddings = self._forward(prompts, pairs)
        broken = {*broken_rows(logits), *broken_rows(embeddings)}
        for slot in broken:
            self.slots.spoil(slot)
        outputs = {"classes": logits.float().cpu(), "embedding": embeddings.cpu()}
        self._tell(
            {
                request: Delta(finish="error", error=no_numbers(request, logits.dtype))
                if slot in broken
                else Delta(output=outputs[request.goal][slot].clone(), finish="stop")
                for slot, request in rows.items()
            }
        )

    def _joined(self) -> dict[int, Request]:
        """What waits, as far as there are slots, by its slot."""
        rows: dict[int, Request] = {}
        while len(rows) < self.limits.slots:
            request = self.queue.take()
            if request is None:
                break
            slot = self.slots.place(request.use, rows)
            try:
                self.slots.hold(slot, request.use)
            except Exception as error:
                deliver(request, Delta(finish="error", error=error))
                continue
            rows[slot] = request
            self._batch.append(request)
        return rows

    def _tell(self, deltas: Mapping[Request, Delta]) -> None:
        self._batch = []
        for request, delta in deltas.items():
            deliver(request, delta)

    def _forward(
        self, prompts: Sequence[Sequence[int]], pairs: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        """The logits of the classes (rows, classes), and the embeddings (rows, width).

        Of a model without a head there are no classes.
        """
        device, longest = self.model.device, max(map(len, prompts))
        pad = self.model.config.pad_token_id or 0

        def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
            made = [[*row, *[value] * (longest - len(row))] for row in rows]
            return torch.tensor(made, device=device)

        mask = padded([[1] * len(ids) for ids in prompts], 0)
        more: dict[str, Any] = {}
        if any(pairs):
            more["token_type_ids"] = padded(pairs, 0)
        kept: list[Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            kept.append(output.last_hidden_state)

        # The head alone gets the hidden states. This call's are the first: with as many tokens as
        # rows, the attachment calls the model once more, to find out which of them are the rows.
        hook = self.model.base_model.register_forward_hook(keep)
        try:
            output = self.model(input_ids=padded(prompts, pad), attention_mask=mask, **more)
        finally:
            hook.remove()
        logits = getattr(output, "logits", None)
        if logits is None:
            logits = kept[0].new_zeros(len(prompts), 0)
        return logits, pooled(kept[0], mask, self._way)

    @torch.no_grad()
    def _prove(self) -> None:
        """Make sure that a row of a batch gets what it gets alone.

        Raises:
            ModelError: it does not.
        """
        last = self.vocabulary - 1
        rows = [[min(token, last) for token in ids] for ids in ([5, 9], [3, 8, 4, 7, 6])]
        try:
            together = self._forward(rows, [(), ()])
            alone = self._forward(rows[:1], [()])
        except Exception as error:
            raise self._refusal(f"a forward pass fails: {error}") from error
        limit = CLOSE.get(self.model.dtype, CLOSE_HALF)
        for found, expected in zip(together, alone, strict=True):
            if not expected.numel():
                continue
            worst = float((found[0].float() - expected[0].float()).abs().max())
            if not worst <= limit * float(expected.abs().max()):
                raise self._refusal(f"a number is {worst:.3g} off")

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"a {type(self.model).__name__} can't be served: in a batch it does not compute what "
            f"it computes alone ({reason})"
        )
