"""Other people's trackers of runs, through transformers' callbacks; none of them can stop a run."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from lorakit.config.marks import flat_settings
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError

TENSORBOARD = "tensorboard"
ONE_RUN_AT_A_TIME: dict[str, Callable[[], TrainerCallback]] = {
    "wandb": WandbCallback,
    "mlflow": MLflowCallback,
    "trackio": TrackioCallback,
}
"""transformers' callbacks of trackers that record one run of a process at a time, by package."""


def check_trackers(names: Sequence[str], *, together: bool = False) -> None:
    """Make sure that trackers are installed.

    Args:
        names: of trackers.
        together: whether several runs are to be recorded by one process at a time.

    Raises:
        ConfigError: some are not, and the message has the line that installs them; or they do not
            record several runs.
    """
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"report_to: {' and '.join(missing)} cannot be imported here: "
            f"pip install {' '.join(missing)}"
        )
    single = [name for name in names if name in ONE_RUN_AT_A_TIME]
    if together and single:
        raise ConfigError(
            f"report_to: {' and '.join(single)} would take the trials of a sweep, which train in "
            "one process, for one run: give --ray local, or leave it out for sweep.json's figures"
        )


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextmanager
def reporting(trainer: Trainer, config: TrainConfig) -> Iterator[None]:
    """Have the figures and settings of a run sent to its trackers, inside a `with` block.

    TensorBoard is one wherever it is installed: its record is a part of a run's folder.
    """
    settings = {name: value for name, _, value in flat_settings(config)}
    names = dict.fromkeys(config.report_to)
    if _is_installed(TENSORBOARD):
        names[TENSORBOARD] = None
    trackers = [Tracker(name, settings, folder=config.out / name) for name in names]
    trainer.add_callback(Report(trackers))
    try:
        yield
    finally:
        for each in trackers:
            each.close()


class RunSettings:
    """A Trainer's arguments, of which trackers record the settings of the run alone."""

    def __init__(self, args: TrainingArguments, settings: Mapping[str, Any]) -> None:
        self._args = args
        self._settings = settings

    def __getattr__(self, name: str) -> Any:
        """Trainer's own."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._args, name)

    def to_dict(self) -> dict[str, Any]:
        """The run's settings by their dotted names."""
        return copy.deepcopy(dict(self._settings))

    def to_json_string(self) -> str:
        """The same as JSON."""
        return json.dumps(self._settings, indent=2)


class Report(TrainerCallback):
    """Passes what happens in a run on to trackers."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a record, with the settings."""
        for each in self._trackers:
            each.open()
            each.pass_on("on_train_begin", args, state, control, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add figures: losses, rates, scores."""
        for each in self._trackers:
            each.pass_on("on_log", args, state, control, **kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell of a checkpoint, which a tracker may keep."""
        for each in self._trackers:
            each.pass_on("on_save", args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the record."""
        for each in self._trackers:
            each.pass_on("on_train_end", args, state, control, **kwargs)


class Tracker:
    """A tracker behind transformers' callback, which gets nothing more once something failed."""

    def __init__(self, name: str, settings: Mapping[str, Any], *, folder: Path) -> None:
        """Prepare a record.

        Args:
            name: the tracker's package.
            settings: those of the run.
            folder: where TensorBoard writes; others have places of their own.
        """
        self._name = name
        self._folder = folder
        self._settings = settings
        self._callback: TrainerCallback | None = None
        self._end: Callable[[], object] | None = None

    def open(self) -> None:
        """Import the tracker, and make its callback."""
        with self._surviving():
            self._callback = self._make_callback()

    def pass_on(
        self,
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Tell the tracker of an event, by the name of the callback's method."""
        if self._callback is not None:
            with self._surviving():
                seen = RunSettings(args, self._settings)
                getattr(self._callback, event)(seen, state, control, **kwargs)

    def close(self) -> None:
        """Close what the end of training leaves open, or what an error left."""
        end, self._end = self._end, None
        if end is not None:
            with self._surviving():
                end()

    def _make_callback(self) -> TrainerCallback:
        if self._name == TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            return TensorBoardCallback(SummaryWriter(log_dir=str(self._folder)))
        module = importlib.import_module(self._name)
        # transformers leaves wandb's run open; one that was open before is its owner's.
        if self._name == "wandb" and module.run is None:
            self._end = module.finish
        return ONE_RUN_AT_A_TIME[self._name]()

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Warn of what fails inside a `with` block, and pass nothing on any more."""
        try:
            yield
        except Exception as error:
            self._callback = None
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            warnings.warn(
                f"{self._name} gets no more of this run, which goes on: {reason}", stacklevel=2
            )
