"""The paper's tasks: GLUE, E2E, WebNLG, DART, WikiSQL and SAMSum, read and written as it does."""

from collections.abc import Mapping
from types import MappingProxyType

from lorakit.data.tasks import dart, e2e, glue, samsum, webnlg, wikisql
from lorakit.data.tasks.task import Task
from lorakit.errors import DataError, did_you_mean

PREFIX = "task:"

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (e2e.TASK, webnlg.TASK, dart.TASK, wikisql.TASK, samsum.TASK, *glue.TASKS)
    }
)
"""The tasks by name."""


def task_of(source: str) -> tuple[Task, str | None, str | None]:
    """The task that a source names, its split and its folder.

    Args:
        source: task:NAME[:SPLIT][@FOLDER].

    Raises:
        DataError: there is no such task, or it has no such split.
    """
    named, _, folder = source.removeprefix(PREFIX).partition("@")
    name, _, split = named.partition(":")
    if name not in TASKS:
        hint = did_you_mean(name, TASKS) or f"; there are {', '.join(TASKS)}"
        raise DataError(f"{source}: there is no task {name!r}{hint}.")
    task = TASKS[name]
    if split and split not in task.splits:
        splits = ", ".join(task.splits)
        raise DataError(f"{source}: {name} has no split {split!r}; it has {splits}.")
    return task, split or None, folder or None
