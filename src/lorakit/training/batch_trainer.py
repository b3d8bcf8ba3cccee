"""transformers' Trainer on our batches: joined rows, their attention, and the loss of texts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from lorakit.data.collate import PACKED
from lorakit.data.length_sampler import ByLength
from lorakit.models.attention import attention_within
from lorakit.training.lm_loss import text_loss
from lorakit.training.loss import Loss


class BatchTrainer(Trainer):
    """Trains whatever requires grad on what a `Collator` makes."""

    def __init__(self, *, by_length: bool = False, **kwargs: Any) -> None:
        """Prepare training; `by_length` has batches of rows of like length."""
        super().__init__(**kwargs)
        self.by_length = by_length
        self._tokens, self._padding = 0, 0

    @property
    def adapted(self) -> nn.Module:
        """The model that is trained, out of its wrappers."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _get_train_sampler(self, *args: Any) -> Any:
        if not self.by_length:
            return super()._get_train_sampler(*args)
        lengths = [len(example.input_ids) for example in self.train_dataset]  # type: ignore
        return ByLength(lengths, batch_size=self.args.train_batch_size, seed=self.args.seed)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch, and add its gradients to `.grad`."""
        self.count(inputs)
        # Gradient checkpointing runs layers again in the backward pass, which needs this too.
        with attention_within(self.adapted, inputs.pop(PACKED, None)):
            return super().training_step(model, inputs, num_items_in_batch)

    def count(self, inputs: dict[str, Any]) -> None:
        """Take note of a batch's tokens, and of those that only pad."""
        packed, tokens = inputs.get(PACKED), inputs["input_ids"].numel()
        real = int(inputs["attention_mask"].sum()) if packed is None else packed.tokens
        self._tokens += tokens
        self._padding += tokens - real

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log figures, and beside a loss the tokens since the last and the share of padding."""
        if "loss" in logs and self._tokens:
            logs |= {"tokens": self._tokens, "padding": round(self._padding / self._tokens, 4)}
            self._tokens, self._padding = 0, 0
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, without logits that no label asks for."""
        how = self.compute_loss_func
        if isinstance(how, Loss) and how.task == "generation":
            assert not return_outputs, "only Trainer's own evaluation asks for outputs"
            return self._loss_of_texts(model, inputs, how, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss_of_texts(
        self, model: nn.Module, inputs: dict[str, Any], how: Loss, items: Tensor | int | None
    ) -> Tensor:
        others = {name: value for name, value in inputs.items() if name != "labels"}
        loss = text_loss(model, others, inputs["labels"], loss=how, items=items)
        if items is not None and self.args.average_tokens_across_devices:
            # The items are those of all processes, and their gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return loss
