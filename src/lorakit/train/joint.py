"""One forward and backward pass for the batches of several adapters, and the Trainer that uses it.

The base is frozen and rows do not see each other, so the gradient of the summed losses with regard
to one adapter is the gradient of its own loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorakit.attach import adapter_parameters
from lorakit.kernels.packed_rows import Segments
from lorakit.methods.layer import AdaptedLayer
from lorakit.models.attention import attention_within
from lorakit.models.roles import output_head
from lorakit.routing import route
from lorakit.train.collate import SEGMENTS
from lorakit.train.loss import IGNORED, Loss
from lorakit.train.trainer import AdapterTrainer


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One adapter's rows of a joint batch."""

    name: str
    """The adapter."""
    inputs: dict[str, Any]
    """What the collator made, labels included."""
    loss: Loss
    items: Tensor | int | None
    """Labelled items of the whole optimizer step, over which the loss is a mean."""

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.inputs["input_ids"])

    @property
    def length(self) -> int:
        """Return the length to which the rows are padded."""
        return self.inputs["input_ids"].shape[1]


def joint_losses(
    model: PreTrainedModel, batches: Sequence[MicroBatch], *, pad_id: int
) -> list[Tensor]:
    """Return each adapter's loss, and add its gradient to `.grad` of its parameters.

    Args:
        model: the base with all the adapters.
        batches: rows of different adapters, of any number and length.
        pad_id: the token to pad with.
    """
    if not model.training:
        model.train()
    inputs = _joined(batches, pad_id=pad_id)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    names = [batch.name for batch in batches for _ in range(batch.rows)]
    # Gradient checkpointing runs layers again in the backward pass, which needs the route too.
    choice = names if len(batches) > 1 else batches[0].name
    with route(model, choice), attention_within(model, _segments(batches)):
        head = _frozen_head(model, batches)
        if head is not None:
            losses = _losses_of_labelled_tokens(model, head, inputs, batches)
        else:
            losses = _losses(model(**inputs).logits, batches, inputs.get("logits_to_keep"))
        torch.stack(losses).sum().backward()
    return [loss.detach() for loss in losses]


def _frozen_head(model: PreTrainedModel, batches: Sequence[MicroBatch]) -> nn.Module | None:
    """Return the output head of a language model, unless it is adapted: then it goes by rows."""
    head = output_head(model)
    texts = all(batch.loss.task == "generation" for batch in batches)
    plain = isinstance(head, nn.Linear) and not isinstance(head, AdaptedLayer)
    return head if texts and plain else None


def _losses_of_labelled_tokens(
    model: PreTrainedModel,
    head: nn.Module,
    inputs: dict[str, Tensor],
    batches: Sequence[MicroBatch],
) -> list[Tensor]:
    """Return the loss of each batch; the output head sees only what predicts a labelled token.

    The positions that any row needs are many when rows of many batches meet, and most of them are
    of no use to the other rows.
    """
    length = inputs["input_ids"].shape[1]
    labels = [
        F.pad(b.inputs["labels"], (0, length - b.length), value=IGNORED).to(model.device)
        for b in batches
    ]
    targets = [rows[:, 1:][rows[:, 1:] != IGNORED] for rows in labels]
    predicts = F.pad(torch.cat(labels)[:, 1:] != IGNORED, (0, 1), value=False)
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][predicts][None],))
    try:
        inputs = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
        logits = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    parts = logits.split([len(each) for each in targets])
    return [
        batch.loss.of_tokens(own, wanted, num_items_in_batch=batch.items)
        for batch, own, wanted in zip(batches, parts, targets, strict=True)
    ]


def _joined(batches: Sequence[MicroBatch], *, pad_id: int) -> dict[str, Tensor]:
    """Return the inputs of all rows, padded on the right to the longest, without labels."""
    length = max(batch.length for batch in batches)
    special = {"labels", "logits_to_keep", SEGMENTS}
    joined = {}
    for key in dict.fromkeys(
        key for batch in batches for key in batch.inputs if key not in special
    ):
        fill = pad_id if key == "input_ids" else 0
        parts = [
            # Rows without token types are of type 0.
            batch.inputs.get(key, torch.zeros_like(batch.inputs["input_ids"]))
            for batch in batches
        ]
        joined[key] = torch.cat([F.pad(p, (0, length - p.shape[1]), value=fill) for p in parts])
    kept = [batch.inputs["logits_to_keep"] for batch in batches if "logits_to_keep" in batch.inputs]
    if kept:
        joined["logits_to_keep"] = torch.cat(kept).unique()
    return joined


def _segments(batches: Sequence[MicroBatch]) -> Segments | None:
    """Return the segments of the joined rows, if they come with segments."""
    parts = [batch.inputs[SEGMENTS] for batch in batches if SEGMENTS in batch.inputs]
    return Segments.stacked(parts) if parts else None


def _losses(logits: Tensor, batches: Sequence[MicroBatch], kept: Tensor | None) -> list[Tensor]:
    """Return the loss of each batch's own rows, from its own positions alone."""
    losses, start = [], 0
    for batch in batches:
        own = logits[start : start + batch.rows]
        start += batch.rows
        labels = batch.inputs["labels"].to(logits.device)
        if kept is not None:
            places = torch.searchsorted(kept, batch.inputs["logits_to_keep"].to(kept.device))
            own = own if len(places) == len(kept) else own[:, places]
        elif labels.dim() == 2:
            own = own[:, : batch.length]
        losses.append(batch.loss({"logits": own}, labels, num_items_in_batch=batch.items))
    return losses


class OwnParameters(nn.Module):
    """What one adapter's Trainer sees of the model: this adapter's parameters, and no others.

    So its optimizer, clipping and zero_grad cannot touch another's, nor lose time on them.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.config = model.config
        # Trainer counts labelled tokens in another way for language models.
        self.loss_type = model.loss_type
        self.trained = nn.ParameterList(p for _, p in adapter_parameters(model, name))


class MemberTrainer(AdapterTrainer):
    """Trains one adapter of several; its forward and backward passes happen elsewhere, jointly."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        adapter_name: str,
        hand_in: Callable[[MicroBatch], Tensor],
        **kwargs: Any,
    ) -> None:
        """Prepare training; `hand_in` has `joint_losses` done, and returns this adapter's loss."""
        self._base = model
        self._hand_in = hand_in
        own = OwnParameters(model, adapter_name)
        super().__init__(model=own, adapter_name=adapter_name, **kwargs)
        self.adapted.to(self.args.device)

    @property
    def adapted(self) -> nn.Module:
        """Return the model that has the adapter."""
        return self._base

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the loss of one batch, and add its gradients to `.grad`.

        Raises:
            TrainingError: the loss is not a number.
        """
        self.count(inputs)
        gradient_state = self.accelerator.gradient_state
        at_step_end = gradient_state.sync_gradients
        assert isinstance(self.compute_loss_func, Loss)
        loss = self._hand_in(
            MicroBatch(
                name=self.adapter_name,
                inputs=inputs,
                loss=self.compute_loss_func,
                items=num_items_in_batch,
            )
        )
        # All Trainers of a process share this state, and the others have had their turn meanwhile.
        gradient_state._set_sync_gradients(at_step_end)
        self.check_loss(loss)
        return loss
