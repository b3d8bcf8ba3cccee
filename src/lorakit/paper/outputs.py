"""What a trained model puts out for each held-out row: a class or a number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorakit.attachment.open_model import Opened, open_model
from lorakit.attachment.state import active_name
from lorakit.data.collate import Collator
from lorakit.data.row_types import ClassificationRow, Rows
from lorakit.errors import DataError
from lorakit.paper.job import Job
from lorakit.training.progress import steps
from lorakit.training.virtual_tokens import encode_for

DIGITS = 6
"""Decimals of a number that a regression puts out, of which a correlation needs fewer."""


def outputs_of(job: Job, adapter: Path, rows: Rows, *, progress: bool) -> list[Any]:
    """The output for each row of the model that a run has trained, in the order of rows.

    Args:
        job: the run's job.
        adapter: the folder of what it trained.
        rows: the rows that are scored.
        progress: show a bar on stderr.
    """
    config = job.config(data=None, out=adapter)
    opened = open_model(adapter, dtype=config.dtype, task=_task(job))
    return _classes(opened, rows, job.scoring.batch_size, progress=progress)


def references_of(rows: Rows) -> list[Any]:
    """The right class or number of each row."""
    return [row.label for row in rows.rows if isinstance(row, ClassificationRow)]


def _task(job: Job) -> str:
    return str(job.given["train"].get("task", "classification"))


@torch.no_grad()
def _classes(opened: Opened, rows: Rows, batch_size: int, *, progress: bool) -> list[Any]:
    model, collate = opened.model.eval(), Collator(opened.tokenizer)
    examples = encode_for(model, active_name(model), rows, opened.tokenizer, opened.data).examples
    if len(examples) < len(rows):
        raise DataError(f"{rows.source}: only {len(examples)} of {len(rows)} rows can be encoded.")
    # Rows of similar length share a batch, so that little of it is padding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].input_ids))
    found: list[Any] = [None] * len(examples)
    for start in steps(len(order), batch_size, title="scoring", show=progress):
        picked = order[start : start + batch_size]
        batch = collate([examples[row] for row in picked])
        batch.pop("labels")
        tensors = {name: value.to(model.device) for name, value in batch.items()}
        logits = model(**tensors).logits.float()
        for row, output in zip(picked, _read(logits, opened.labels), strict=True):
            found[row] = output
    return found


def _read(logits: torch.Tensor, labels: Sequence[str] | None) -> list[Any]:
    if labels is None:
        return [round(value, DIGITS) for value in logits.squeeze(-1).tolist()]
    return [labels[index] for index in logits.argmax(-1).tolist()]
