"""The folder of a run: made, locked and looked through before anything else is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

from lorakit.adapter.output_place import check_place
from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.config.train import TrainConfig
from lorakit.errors import OutputError, TrainingError
from lorakit.training.checkpoints import list_checkpoints

LOCK = ".lock"
"""The file in a run's folder that its process holds locked; it says nothing."""
LOG = "log.jsonl"
MADE_BY_A_RUN = (CONFIG_FILE, LOG, "checkpoints/checkpoint-*/trainer_state.json", f"*/{LOG}")
"""Files by which the folder of a run or a sweep is told from any other."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder, and let no other process train into it, for a block of work.

    A folder that is empty after the block is removed if it was not there before.

    Raises:
        OutputError: it is no folder, it cannot be made, or another process trains into it.
    """
    check_place(folder, "a run writes a folder")
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    lock = filelock.FileLock(folder / LOCK)
    with ExitStack() as undo:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            undo.callback(_remove_empty, missing)
            undo.enter_context(lock.acquire(timeout=0))
        except filelock.Timeout:
            raise OutputError(
                f"{folder} is being written by another run: wait for its end, or choose another "
                "folder"
            ) from None
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
        undo.callback(_remove, folder / LOCK)
        yield


def _remove(lock: Path) -> None:
    """Remove a lock that is held; one that another process has opened meanwhile is tried anew."""
    with suppress(OSError):  # Windows removes it on release, and not before.
        lock.unlink()


def _remove_empty(made: list[Path]) -> None:
    """Remove folders, the innermost first, until one holds something."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but a lock, or is not there."""
    return not folder.is_dir() or all(each.name == LOCK for each in folder.iterdir())


def check_free(config: TrainConfig) -> None:
    """Make sure that a new run may write its folder.

    Raises:
        OutputError: something is there already, and `overwrite` is not set; or it is nothing that a
            run has made.
    """
    if _is_empty(config.out):
        return
    if not config.overwrite:
        raise OutputError(
            f"{config.out} exists and is not empty: choose another folder, or give --resume to "
            "go on with its run or --overwrite to replace it"
        )
    if not any(path for pattern in MADE_BY_A_RUN for path in config.out.glob(pattern)):
        inside = sorted(each.name for each in config.out.iterdir() if each.name != LOCK)
        raise OutputError(
            f"{config.out} holds {', '.join(inside[:3])}{', …' if len(inside) > 3 else ''} and no "
            "run, and --overwrite replaces runs alone: choose another folder"
        )


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or make sure that the folder is free.

    Raises:
        OutputError: the folder is in use.
        TrainingError: there is nothing to resume.
    """
    if not config.resume:
        check_free(config)
        return None
    checkpoints = list_checkpoints(config.out / "checkpoints")
    if not checkpoints:
        raise TrainingError(f"{config.out} has no checkpoint to resume: leave out --resume")
    return checkpoints[-1]
