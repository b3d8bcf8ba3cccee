"""The rows of a run, as far as memory and time depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.config.estimate import EstimateConfig
from lorakit.data.encode import encode_rows
from lorakit.data.rows import read_rows
from lorakit.data.samples import Example
from lorakit.errors import ConfigError
from lorakit.models.load import own_classes
from lorakit.models.tasks import has_classes
from lorakit.models.without_weights import load_tokenizer

TASKS = ("generation", "classification", "regression", "multi-label", "token-classification")
"""The tasks whose runs are estimated."""
CLASSES = ("0", "1")
"""The classes of a fresh head where no rows say which."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The rows of a run, longest first."""

    rows: Sequence[Example]
    """One row where all are alike."""
    task: str
    labels: tuple[str, ...] | None
    source: str
    """Where the lengths are from, in words."""

    def largest(self, count: int) -> list[Example]:
        """The rows of the largest batch."""
        return [self.rows[min(place, len(self.rows) - 1)] for place in range(count)]

    def usual_share(self, count: int) -> float:
        """Tokens of a usual batch over those of the largest."""
        mean = sum(len(each.input_ids) for each in self.rows) / len(self.rows)
        most = sum(len(each.input_ids) for each in self.largest(count)) / count
        return mean / most


def workload_of(config: EstimateConfig) -> Workload:
    """The rows of a run: those that the settings name, or ones of `row_tokens` each.

    Raises:
        ConfigError: rows of the task cannot be made up.
        DataError: rows are named, and cannot be used.
        ModelError: the tokenizer cannot be read.
    """
    if config.row_tokens is None and config.data.train is not None:
        found = _of_rows(config)
        if found.task not in TASKS:
            raise ConfigError(f"task {found.task} is not estimated; {', '.join(TASKS)} are")
        return found
    task = "generation" if config.task == "auto" else config.task
    length = config.row_tokens or config.data.max_length
    by_task: dict[str, Any] = {"generation": [1] * length, "classification": 1, "regression": 0.5}
    if task not in by_task:
        raise ConfigError(f"task: {task} is estimated from rows: give data.train")
    label = by_task[task]
    named = None if config.data.labels is None else tuple(config.data.labels)
    given = "" if config.row_tokens else " (data.max_length, as no rows are named)"
    return Workload(
        rows=[Example(input_ids=[1] * length, labels=label)],
        task=task,
        labels=(named or CLASSES) if task == "classification" else None,
        source=f"rows of {length} tokens each{given}",
    )


def _of_rows(config: EstimateConfig) -> Workload:
    data = config.data
    assert data.train is not None
    asked = None if config.task == "auto" else config.task
    labels = None if data.labels is None else tuple(data.labels)
    if labels is None and (asked is None or has_classes(asked)):
        labels = own_classes(config.model, asked)
    rows = read_rows(data.train, data, limit=data.train_rows, labels=labels, task=asked)
    examples = encode_rows(rows, load_tokenizer(config.model), data).examples
    ordered = sorted(examples, key=lambda each: -len(each.input_ids))
    lengths = [len(each.input_ids) for each in ordered]
    return Workload(
        rows=ordered,
        task=asked or rows.task,
        labels=rows.labels,
        source=f"memory is of a batch of the longest rows, of up to {lengths[0]} tokens; time of "
        f"the mean row, of {sum(lengths) / len(lengths):.0f}",
    )
