"""Scores of a model on rows, loss and accuracy in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.data.collate import Collator
from lorakit.data.encode import Example
from lorakit.data.metrics.basic import accuracy, matthews, pearson
from lorakit.training.lm_loss import is_target, text_losses
from lorakit.training.loss import Loss, perplexity
from lorakit.training.processes import count, gathered, share
from lorakit.training.progress import steps

BEST_BY = {"generation": "loss", "classification": "accuracy", "regression": "pearson"}
"""The score that decides which adapter is the best, by what the model does. Some tasks of the paper
have another."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a model on rows, and what it predicted."""

    scores: dict[str, float]
    """`loss` (nats), and `perplexity` for texts, `accuracy` (0 to 1) for classes and where asked
    for `matthews`, `pearson` (-1 to 1) for numbers."""
    predicted: list[int] | list[float]
    """The number of each row's class, or the number itself; none for texts."""


@torch.no_grad()
def scored(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    loss: Loss,
    collate: Collator,
    batch_size: int,
    best_by: str | None = None,
    progress: bool = False,
) -> Scored:
    """The mean loss per target token or row, the scores of the task, and what was predicted.

    Processes that train together have a share of the rows each, and all have the result.
    """
    model.eval()
    device = next(model.parameters()).device
    summed, counted = 0.0, 0
    rows: list[int] = []
    predicted: list[Tensor] = []
    expected: list[Tensor] = []
    # Rows of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    own, most = share(order), math.ceil(len(order) / count())
    # All processes call the model equally often: they may have to gather its weights for a call.
    for start in steps(most, batch_size, title="evaluating", show=progress):
        chosen = own[start : start + batch_size]
        batch = collate([examples[row] for row in chosen or order[:1]])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        if loss.task == "generation":
            _, losses = text_losses(
                model, batch, labels, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss
            )
            if chosen:
                summed += float(losses.sum())
                counted += int(is_target(labels).sum())
            continue
        logits = model(**batch).logits
        if not chosen:
            continue
        summed, counted = summed + float(loss.summed(logits, labels)), counted + len(labels)
        rows += chosen
        predicted.append(logits.float().cpu())
        expected.append(labels.cpu())
    sums = gathered((summed, counted))
    mean = sum(each for each, _ in sums) / max(sum(each for _, each in sums), 1)
    if loss.task == "generation":
        return Scored(scores={"loss": mean, "perplexity": perplexity(mean)}, predicted=[])
    # In the order of the rows.
    parts = gathered((rows, predicted, expected))
    back = torch.tensor([row for own, _, _ in parts for row in own]).argsort()
    outputs = torch.cat([each for _, own, _ in parts for each in own])[back]
    wanted = torch.cat([each for _, _, own in parts for each in own])[back]
    found = _of_labels(loss.task, mean, outputs, wanted)
    if best_by == "matthews":
        found.scores["matthews"] = matthews(
            [int(each) for each in found.predicted], wanted.tolist()
        )
    return found


def _of_labels(task: str, loss: float, logits: Tensor, labels: Tensor) -> Scored:
    """The scores of rows with labels, of their logits (rows × classes, or rows × 1)."""
    right = labels.tolist()
    if task == "regression":
        numbers = logits.squeeze(-1).tolist()
        return Scored(scores={"loss": loss, "pearson": pearson(numbers, right)}, predicted=numbers)
    classes = logits.argmax(-1).tolist()
    return Scored(scores={"loss": loss, "accuracy": accuracy(classes, right)}, predicted=classes)
