"""transformers' Trainer on lorakit's batches: packed rows, their attention, the loss of texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lorakit.data.collate import PACKED
from lorakit.data.length_sampler import ByLength
from lorakit.models.attention import attention_within
from lorakit.training.lm_loss import item_weight, text_losses
from lorakit.training.loss import Loss
from lorakit.training.processes import BORROWED, count, seed_step, sum_gradients, total


class BatchTrainer(Trainer):
    """Trains all parameters that require grad, on the batches of a `Collator`."""

    def __init__(self, *, by_length: bool = False, **kwargs: Any) -> None:
        """Prepare training; with `by_length`, rows of similar length share a batch."""
        super().__init__(**kwargs)
        self.by_length = by_length
        self._tokens, self._padding = 0, 0
        self._passes, self._borrowed, self._whole_loss = 0, False, torch.zeros(())

    @property
    def adapted(self) -> nn.Module:
        """The model that is trained, without the wrappers of Trainer and accelerate."""
        assert isinstance(self.model, nn.Module)
        return self.model

    def _get_train_sampler(self, *args: Any) -> Any:
        if not self.by_length:
            return super()._get_train_sampler(*args)
        lengths = [len(example.input_ids) for example in self.train_dataset]  # type: ignore
        return ByLength(lengths, batch_size=self.args.train_batch_size, seed=self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """The items, of all processes, that a step's loss is averaged over."""
        own = self._own_items([each for each in batch_samples if BORROWED not in each], device)
        return own if count() == 1 else total(torch.tensor(int(own or 0)))

    def _own_items(self, batch_samples: list[Any], device: Any) -> Any:
        """The target tokens, or rows with a label each, of this process's batches, if any.

        transformers counts the labels that are not IGNORED, and a number to predict may be that.
        """
        objective = getattr(self.compute_loss_func, "objective", None)
        if objective is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        by_row = [torch.zeros(objective.count(each["labels"])) for each in batch_samples]
        counted = [{"labels": each, "shift_labels": each} for each in by_row]
        return super()._get_num_items_in_batch(counted, device)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch, and add its gradients to `.grad`.

        Of several processes the losses are summed, and the gradients after a step's last batch.
        """
        self._borrowed = inputs.pop(BORROWED, False)
        if not self._borrowed:
            self.count(inputs)
        if count() > 1:
            seed_step(self.args.seed, self.state.global_step, self._passes)
            self._passes += 1
        # The backward pass is inside too: gradient checkpointing runs layers again there.
        with attention_within(self.adapted, inputs.pop(PACKED, None)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if count() == 1:
            return loss
        if self.accelerator.sync_gradients:
            self._passes = 0
            sum_gradients(each for each in self.adapted.parameters() if each.requires_grad)
        return self._whole_loss

    def count(self, inputs: dict[str, Any]) -> None:
        """Add a batch to the counts of tokens and of padding tokens."""
        if "input_ids" not in inputs:
            return
        packed, tokens = inputs.get(PACKED), inputs["input_ids"].numel()
        real = int(inputs["attention_mask"].sum()) if packed is None else packed.tokens
        self._tokens += tokens
        self._padding += tokens - real

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log figures; to a loss, add the tokens since the last log and the share of padding."""
        tokens, padding = total(torch.tensor([self._tokens, self._padding])).tolist()
        if "loss" in logs and tokens:
            logs |= {"tokens": tokens, "padding": round(padding / tokens, 4)}
            self._tokens, self._padding = 0, 0
        through = getattr(self.compute_loss_func, "through", None)
        if "loss" in logs and through is not None:
            # TRL knows of no other process.
            figures = through.figures()
            means = total(torch.tensor(list(figures.values()), dtype=torch.float64)) / count()
            logs |= dict(zip(figures, means.tolist(), strict=True))
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; of texts, without the logits that no label needs."""
        how = self.compute_loss_func
        if not isinstance(how, Loss):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return found if isinstance(found, tuple) else self._checked(found)
        assert not return_outputs, "only Trainer's own evaluation asks for outputs"
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if how.objective is not None:
            return self._checked(how.of_rows(model, given, labels, num_items_in_batch))
        loss, _ = text_losses(
            model,
            given,
            labels,
            weights=item_weight(labels, num_items_in_batch),
            label_smoothing=how.label_smoothing,
            z_loss=how.z_loss,
        )
        return self._checked(loss)

    def _checked(self, loss: Tensor) -> Tensor:
        """The loss of this process's rows, if that of all processes is to be trained on."""
        if self._borrowed:
            loss = loss * 0
        self._whole_loss = total(loss.detach())
        self.check_loss(self._whole_loss)
        return loss

    def check_loss(self, loss: Tensor) -> None:
        """Accept every loss; a subclass may stop the run here, before the backward pass."""
