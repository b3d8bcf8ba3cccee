"""The rows of runs, and the task and the classes that they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorakit.config.train import TrainConfig
from lorakit.data.labels import UNKNOWN_LABEL, head_classes
from lorakit.data.objectives import OBJECTIVES, task_of_base
from lorakit.data.row_types import Rows
from lorakit.data.rows import read_rows
from lorakit.data.tasks import PREFIX, task_of
from lorakit.errors import ConfigError, DataError
from lorakit.models.load import own_classes
from lorakit.models.tasks import has_classes
from lorakit.training.evaluation import BEST_BY
from lorakit.training.loaded_base import LoadedBase

OTHER_HEAD = "For other classes than those of the checkpoint's head set fresh_head: true."


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The training and validation rows of a run, and the task that was inferred from them."""

    task: str
    training: Rows
    validation: Rows | None


def with_same_rows(configs: Mapping[str, TrainConfig]) -> dict[str, str]:
    """The name of the first run with the same settings of data, for each run."""
    first: dict[str, str] = {}
    return {
        name: first.setdefault(config.data.model_dump_json(), name)
        for name, config in configs.items()
    }


def read_task_rows(config: TrainConfig, base: LoadedBase | None) -> TaskRows:
    """Read the rows of a run.

    Args:
        config: its settings.
        base: the base, if it is loaded already.

    Raises:
        ConfigError: the settings name no rows, or other classes than the base's head has.
        DataError: the rows cannot be used; lists what is wrong.
    """
    data, labels = config.data, _known_classes(config, base)
    if data.train is None:
        raise ConfigError("data.train must say which rows to train on")
    asked = None if config.task == "auto" else config.task
    try:
        rows = read_rows(data.train, data, limit=data.train_rows, labels=labels, task=asked)
    except DataError as error:
        if base or labels is None or data.labels or UNKNOWN_LABEL not in str(error):
            raise
        raise DataError(f"{error}\n{OTHER_HEAD}") from error
    task = asked or rows.task
    if task in OBJECTIVES and OBJECTIVES[task].needs_others(rows.rows):
        _check_others(config, task, rows)
    held_out = None
    if data.validation is not None:
        held_out = read_rows(
            data.validation,
            data,
            limit=data.validation_rows,
            every=data.validation_every,
            split="validation",
            labels=rows.labels,
            task=task,
        )
        if task in OBJECTIVES:
            OBJECTIVES[task].check_library()
    return TaskRows(task=task, training=rows, validation=held_out)


def _check_others(config: TrainConfig, task: str, rows: Rows) -> None:
    """Make sure that a batch can have two rows.

    Raises:
        ConfigError: it has one.
    """
    found = "batch_size is 1" if config.batch_size == 1 else f"{rows.source} has one row"
    if min(config.batch_size, len(rows)) == 1:
        raise ConfigError(
            f"{found}, and the loss of {task} compares the rows of a batch: with one alone nothing "
            "is learnt; give batches of several rows, or rows with negative"
        )


def _known_classes(config: TrainConfig, base: LoadedBase | None) -> tuple[str, ...] | None:
    """The classes of a head that the base has already, in its order; None: it has none yet.

    Raises:
        ConfigError: the settings have others.
    """
    if config.task != "auto" and not has_classes(task_of_base(config.task)):
        return None
    if config.fresh_head:
        return None if config.data.labels is None else tuple(config.data.labels)
    if base is None:
        own = own_classes(config.model, None if config.task == "auto" else config.task)
        return head_classes(config.data.labels, own, whose=config.model, hint=OTHER_HEAD)
    return base.classes() if config.data.labels is None else None


def shared_task(read: Mapping[str, TaskRows]) -> tuple[str, tuple[str, ...] | None]:
    """The task and the classes, which must be the same for all: the model has one head.

    Raises:
        ConfigError: they differ.
    """
    found = {name: (rows.task, rows.training.labels) for name, rows in read.items()}
    if len(set(found.values())) > 1:
        lines = [
            f"{name}: {task}" + (f" into {', '.join(labels)}" if labels else "")
            for name, (task, labels) in found.items()
        ]
        raise ConfigError.listing("trials share one task with the same classes", lines)
    return next(iter(found.values()))


def best_score(config: TrainConfig, task: str, held_out: Rows | None) -> str:
    """The score that decides: of a task of the paper its own, else that of such rows."""
    source = config.data.validation or ""
    own = task_of(source)[0].best_by if source.startswith(PREFIX) else None
    if own or held_out is None or task not in OBJECTIVES:
        return own or BEST_BY[task]
    return OBJECTIVES[task].best_of(held_out.rows)
