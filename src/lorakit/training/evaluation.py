"""Scores of a model on rows, loss and accuracy in one pass, and its generated answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lorakit.data.batches import generation_batch, pad_token
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


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    progress: bool = False,
    **search: Any,
) -> list[str]:
    """The text that the model generates after each prompt; greedily, unless an option is given.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: its tokenizer.
        prompts: token ids.
        max_new_tokens: longest answer, in tokens.
        batch_size: prompts at once.
        progress: show it on stderr.
        search: options of transformers' GenerationConfig, such as num_beams.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    texts = [""] * len(prompts)
    settings = generation_settings(tokenizer, max_new_tokens=max_new_tokens, **search)
    for start in steps(len(order), batch_size, title="answering", show=progress):
        rows = order[start : start + batch_size]
        batch = generation_batch([prompts[row] for row in rows], pad_id=pad_token(tokenizer))
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        written = cast(Any, model).generate(**batch, generation_config=settings)
        assert isinstance(written, Tensor)
        new = written[:, batch["input_ids"].shape[1] :]
        decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text.strip()
    return texts


def generation_settings(
    tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int, **options: Any
) -> GenerationConfig:
    """Settings for generation that do not inherit the base model's own sampling options."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=options.pop("do_sample", False),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
