"""Scores of a model on rows, loss and the scores of its task in one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.collate import Collator
from lorakit.data.objectives import OBJECTIVES
from lorakit.data.samples import Example
from lorakit.training.lm_loss import is_target, text_losses
from lorakit.training.loss import Loss, perplexity
from lorakit.training.processes import count, gathered, share
from lorakit.training.progress import steps

BEST_BY = {"generation": "loss", **{task: each.best_by for task, each in OBJECTIVES.items()}}
"""The score that decides which adapter is the best, by what the model does. Some tasks of the paper
have another."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a model on rows, and what it predicted."""

    scores: dict[str, float]
    """`loss` (nats), and `perplexity` for texts, or what the task's objective scores."""
    predicted: list[Any]
    """What the objective makes of each row's output; none for texts."""


@torch.no_grad()
def scored(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    loss: Loss,
    collate: Collator,
    batch_size: int,
    names: tuple[str, ...] | None = None,
    best_by: str | None = None,
    progress: bool = False,
) -> Scored:
    """The mean loss per target token or row, the scores of the task, and what was predicted.

    `names` are those of the classes, for a task that has some.
    Processes that train together have a share of the rows each, and all have the result.
    """
    model.eval()
    device = next(model.parameters()).device
    summed, counted = 0.0, 0
    objective = loss.objective
    found: dict[int, Any] = {}
    # Rows of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    own, most = share(order), math.ceil(len(order) / count())
    # All processes call the model equally often: they may have to gather its weights for a call.
    for start in steps(most, batch_size, title="evaluating", show=progress):
        chosen = own[start : start + batch_size]
        batch = collate([examples[row] for row in chosen or order[:1]])
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = batch.pop("labels")
        if objective is None:
            _, losses = text_losses(
                model, batch, labels, label_smoothing=loss.label_smoothing, z_loss=loss.z_loss
            )
            if chosen:
                summed += float(losses.sum())
                counted += int(is_target(labels).sum())
            continue
        outputs = objective.outputs(model, batch)
        if not chosen:
            continue
        summed = summed + float(loss.summed(outputs, labels))
        counted = counted + objective.count(labels)
        found |= zip(chosen, objective.answers(outputs, labels), strict=True)
    sums = gathered((summed, counted))
    mean = sum(each for each, _ in sums) / max(sum(each for _, each in sums), 1)
    if objective is None:
        return Scored(scores={"loss": mean, "perplexity": perplexity(mean)}, predicted=[])
    by_row = {row: answer for own in gathered(found) for row, answer in own.items()}
    predicted = objective.combined([by_row[row] for row in range(len(examples))], examples)
    scores = objective.scores(predicted, examples, names=names, best_by=best_by)
    return Scored(scores={"loss": mean, **scores}, predicted=predicted)


def compared(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as the adapters of a run are compared by them.

    A correlation that is not defined, as of one row, is 0 there, so that the losses decide; but not
    where the loss is none either.
    """
    undefined = {name for name, value in scores.items() if math.isnan(value)}
    if "loss" in undefined:
        return dict(scores)
    return {**scores, **dict.fromkeys(undefined, 0.0)}
