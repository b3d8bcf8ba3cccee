"""Scores of a model on rows, loss and accuracy in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.data.collate import Collator
from lorakit.data.encode import Example
from lorakit.data.metrics.basic import accuracy, pearson
from lorakit.training.lm_loss import is_target, text_losses
from lorakit.training.loss import Loss, perplexity
from lorakit.training.progress import steps


@torch.no_grad()
def score(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    loss: Loss,
    collate: Collator,
    batch_size: int,
    progress: bool = False,
) -> dict[str, float]:
    """The mean loss per target token or row, and the scores of the task.

    Returns:
        `loss` (nats), and `perplexity` for texts, `accuracy` (0 to 1) for classes, `pearson` (-1 to
        1) for numbers.
    """
    model.eval()
    device = next(model.parameters()).device
    summed, count = 0.0, 0
    predicted: list[Tensor] = []
    expected: list[Tensor] = []
    # Rows of similar length share a batch, so that little of it is padding.
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for start in steps(len(ordered), batch_size, title="evaluating", show=progress):
        batch = collate(ordered[start : start + batch_size])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        if loss.task == "generation":
            _, losses = text_losses(
                model, batch, labels, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss
            )
            summed, count = summed + float(losses.sum()), count + int(is_target(labels).sum())
            continue
        logits = model(**batch).logits
        summed, count = summed + float(loss.summed(logits, labels)), count + len(labels)
        predicted.append(logits.float().cpu())
        expected.append(labels.cpu())
    mean = summed / max(count, 1)
    return {"loss": mean, **_task_scores(loss.task, mean, predicted, expected)}


def _task_scores(
    task: str, loss: float, predicted: Sequence[Tensor], expected: Sequence[Tensor]
) -> dict[str, float]:
    if task == "generation":
        return {"perplexity": perplexity(loss)}
    logits, labels = torch.cat(list(predicted)), torch.cat(list(expected))
    if task == "regression":
        return {"pearson": pearson(logits.squeeze(-1).tolist(), labels.tolist())}
    return {"accuracy": accuracy(logits.argmax(-1).tolist(), labels.tolist())}
