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

from lorakit.attachment.attach import adapter_parameters
from lorakit.data.chat import IGNORED
from lorakit.data.collate import PACKED
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.attention import attention_within
from lorakit.routing.route import route
from lorakit.training.lm_loss import item_weight, text_losses
from lorakit.training.loss import Loss
from lorakit.training.trainer import AdapterTrainer
from lorakit.upstream.private_names import set_sync_gradients


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One adapter's rows of a joint batch."""

    name: str
    """The adapter."""
    inputs: dict[str, Any]
    """The collator's batch, labels included."""
    loss: Loss
    items: Tensor | int | None
    """Target tokens or rows of the whole optimizer step, over which the loss is a mean."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.inputs["input_ids"])

    @property
    def length(self) -> int:
        """The length to which the rows are padded."""
        return self.inputs["input_ids"].shape[1]


def joint_losses(
    model: PreTrainedModel, batches: Sequence[MicroBatch], *, pad_id: int
) -> list[Tensor]:
    """Compute each adapter's loss, and add its gradient to `.grad` of its parameters.

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
    losses = _losses_of_texts if batches[0].loss.objective is None else _losses
    # The backward pass is inside too: gradient checkpointing runs layers again there.
    choice = names if len(batches) > 1 else batches[0].name
    with route(model, choice), attention_within(model, _packed_sequences(batches)):
        total, found = losses(model, inputs, batches)
        total.backward()
    return found


def _joined(batches: Sequence[MicroBatch], *, pad_id: int) -> dict[str, Tensor]:
    """The inputs of all rows, padded on the right to the longest, without labels."""
    special = {"labels", PACKED}
    joined = {}
    for key in dict.fromkeys(
        key for batch in batches for key in batch.inputs if key not in special
    ):
        fill = pad_id if key.endswith("input_ids") else 0
        parts = [
            # Rows without token types are of type 0.
            batch.inputs.get(key, torch.zeros_like(batch.inputs["input_ids"]))
            for batch in batches
        ]
        # The decoder of an encoder-decoder reads rows of another length.
        longest = max(p.shape[1] for p in parts)
        joined[key] = torch.cat([F.pad(p, (0, longest - p.shape[1]), value=fill) for p in parts])
    return joined


def _packed_sequences(batches: Sequence[MicroBatch]) -> PackedSequences | None:
    """The packed sequences of all rows, or None where the batches have none."""
    parts = [batch.inputs[PACKED] for batch in batches if PACKED in batch.inputs]
    return PackedSequences.stacked(parts) if parts else None


def _losses_of_texts(
    model: PreTrainedModel, inputs: dict[str, Tensor], batches: Sequence[MicroBatch]
) -> tuple[Tensor, list[Tensor]]:
    """The sum of the losses, and the loss of each batch."""
    own = [batch.inputs["labels"] for batch in batches]
    # Not the length of the inputs: the decoder of an encoder-decoder reads rows of another one.
    length = max(each.shape[1] for each in own)
    labels = [F.pad(each, (0, length - each.shape[1]), value=IGNORED) for each in own]
    weights = [item_weight(own, batch.items) for own, batch in zip(labels, batches, strict=True)]
    total, losses = text_losses(
        model,
        inputs,
        torch.cat(labels).to(model.device),
        weights=_of_rows(weights, batches),
        label_smoothing=_of_rows([batch.loss.label_smoothing for batch in batches], batches),
        z_loss=_of_rows([batch.loss.z_loss for batch in batches], batches),
    )
    parts = losses.split([batch.rows for batch in batches])
    return total, [part.sum() * weight for part, weight in zip(parts, weights, strict=True)]


def _of_rows(values: Sequence[float], batches: Sequence[MicroBatch]) -> float | Tensor:
    """The value of each row's batch, or one number where all batches have the same."""
    if len(set(values)) == 1:
        return values[0]
    rows = torch.tensor([batch.rows for batch in batches])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(rows)


def _losses(
    model: PreTrainedModel, inputs: dict[str, Tensor], batches: Sequence[MicroBatch]
) -> tuple[Tensor, list[Tensor]]:
    """The same for rows with labels."""
    objective = batches[0].loss.objective
    assert objective is not None
    outputs = objective.outputs(model, inputs)
    losses = [
        batch.loss(own, batch.inputs["labels"].to(outputs.device), batch.items)
        for batch, own in zip(batches, outputs.split([b.rows for b in batches]), strict=True)
    ]
    return torch.stack(losses).sum(), [loss.detach() for loss in losses]


class OwnParameters(nn.Module):
    """The parameters of one adapter, as the model that its Trainer is given.

    Its optimizer, clipping and zero_grad cannot touch those of another, nor spend time on them.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        super().__init__()
        self.config = model.config
        # By this Trainer counts target tokens: for language models, without the first of a row.
        self.loss_type = model.loss_type
        self.trained = nn.ParameterList(p for _, p in adapter_parameters(model, name))


class TrialTrainer(AdapterTrainer):
    """Trains one adapter of several, whose forward and backward pass is the joint one."""

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        adapter_name: str,
        submit: Callable[[MicroBatch], Tensor],
        **kwargs: Any,
    ) -> None:
        """Prepare training; `submit` has its batch put into a joint step, and returns its loss."""
        self._base = model
        self._submit = submit
        own = OwnParameters(model, adapter_name)
        super().__init__(model=own, adapter_name=adapter_name, **kwargs)
        self.adapted.to(self.args.device)

    @property
    def adapted(self) -> nn.Module:
        """The base model with all adapters."""
        return self._base

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch, and add its gradients to `.grad`.

        Raises:
            TrainingError: the loss is not a number.
        """
        self.count(inputs)
        gradient_state = self.accelerator.gradient_state
        at_step_end = gradient_state.sync_gradients
        assert isinstance(self.compute_loss_func, Loss)
        loss = self._submit(
            MicroBatch(
                name=self.adapter_name,
                inputs=inputs,
                loss=self.compute_loss_func,
                items=num_items_in_batch,
            )
        )
        # All Trainers of a process share this state, and others have run meanwhile.
        set_sync_gradients(gradient_state, at_step_end)
        self.check_loss(loss)
        return loss
