"""Going on from a checkpoint: its record of the run, and what may differ when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.config.marks import flat_settings
from lorakit.config.train import TrainConfig
from lorakit.data.samples import Encoded
from lorakit.errors import TrainingError
from lorakit.training.checkpoints import step_of
from lorakit.training.prepare import Prepared

RUN_FILE = "run.json"
"""The record of a run in each of its checkpoints."""

ChangedSetting = Mapping[str, Any]
"""The settings that a resumed run changed, with the values that they had up to a step."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The record of a run in its checkpoints."""

    settings: Mapping[str, Any]
    """Every setting but those of the call, by dotted name, as JSON values."""
    rates: Mapping[str, float]
    """Peak learning rate of each method."""
    training: str
    """Hash of the encoded training rows."""
    validation: str | None
    """Hash of the encoded validation rows."""
    labels: Sequence[str] | None
    """The classes, in order."""
    changes: Sequence[ChangedSetting] = ()
    """What earlier resumptions changed, oldest first."""

    @staticmethod
    def of(
        config: TrainConfig, prepared: Prepared, changes: Sequence[ChangedSetting] = ()
    ) -> RunRecord:
        """The record of a run."""
        return RunRecord(
            settings={name: value for name, (_, value) in _compared(config).items()},
            rates={method: rate.value for method, rate in prepared.rates.items()},
            training=prepared.training.content_hash,
            validation=_hash(prepared.validation),
            labels=None if prepared.labels is None else list(prepared.labels),
            changes=changes,
        )

    def save(self, checkpoint: Path) -> None:
        """Write the record into the folder of a checkpoint."""
        (checkpoint / RUN_FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def load(checkpoint: Path) -> RunRecord | None:
        """The record in a checkpoint; None: it is from before there was one.

        Raises:
            TrainingError: it cannot be read.
        """
        file = checkpoint / RUN_FILE
        if not file.is_file():
            return None
        try:
            return RunRecord(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(f"{file} cannot be read: {error}") from error


def _compared(config: TrainConfig) -> dict[str, tuple[bool, Any]]:
    """Whether it may change, and its value, for each setting that is not of one call."""
    settings = flat_settings(config)
    return {name: (mark.may_change, value) for name, mark, value in settings if mark.compared}


def settings_to_resume(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """The settings with which a run goes on: those of the call, or with `keep_settings` the saved.

    Raises:
        TrainingError: a setting that may not change is another than in the checkpoint; lists all.
            Or this process does not see the checkpoint, which the first one found.
    """
    if not checkpoint.is_dir():
        raise TrainingError(
            f"{checkpoint} is not on this machine, and the first process of the run found it: each "
            "reads it to resume, so give an out that all machines see"
        )
    saved = RunRecord.load(checkpoint)
    if config.keep_settings:
        if saved is None:
            raise TrainingError(f"{checkpoint} has no record of its settings: give them again")
        return _kept(config, saved.settings)
    if saved is None:
        return config
    problems = [
        f"{name} is {_shown(value)}, and was {_shown(saved.settings[name])}"
        for name, (may_change, value) in _compared(config).items()
        if not may_change and name in saved.settings and value != saved.settings[name]
    ]
    if problems:
        raise TrainingError.listing(
            f"{checkpoint} can't be resumed with other settings; give those that it was started "
            "with, or --keep-settings to take them over, or --overwrite to start anew",
            problems,
        )
    return config


def _kept(config: TrainConfig, saved: Mapping[str, Any]) -> TrainConfig:
    """The saved settings, with those of the call that are given and may change."""
    given = _given(config)
    values: dict[str, Any] = {}
    for name, (may_change, value) in _compared(config).items():
        section, _, last = name.rpartition(".")
        inside = values.setdefault(section, {}) if section else values
        inside[last] = value if may_change and name in given else saved.get(name, value)
    of_the_call = {
        name: getattr(config, name) for name, mark, _ in flat_settings(config) if not mark.compared
    }
    return TrainConfig.model_validate(values | of_the_call)


def _given(config: TrainConfig) -> set[str]:
    """The dotted names of the settings that the call gives."""
    of_data = {f"data.{name}" for name in config.data.model_fields_set}
    return config.model_fields_set | of_data


def _shown(value: Any) -> str:
    """A setting's value as it is typed."""
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


def changes_of(
    config: TrainConfig, prepared: Prepared, checkpoint: Path | None
) -> tuple[ChangedSetting, ...]:
    """What this and earlier resumptions change, compared with what the run was started with.

    Raises:
        TrainingError: the rows, the learning rates or the number of steps do not go on from the
            checkpoint; lists all.
    """
    saved = RunRecord.load(checkpoint) if checkpoint else None
    if checkpoint is None or saved is None:
        return ()
    now, step = RunRecord.of(config, prepared), step_of(checkpoint)
    problems = []
    if now.training != saved.training:
        problems.append("the training rows are other ones, or come to other tokens")
    if now.labels != saved.labels:
        problems.append(f"the classes are {now.labels}, and were {saved.labels}")
    if now.rates != saved.rates:
        problems.append(f"learning rates are {_rates(now)}, and were {_rates(saved)}")
    if prepared.steps < step:
        problems.append(f"it has {step} steps already, and the run is to have {prepared.steps}")
    if problems:
        raise TrainingError.listing(
            f"{checkpoint} can't be resumed as this run; --overwrite starts anew", problems
        )
    before = {
        name: saved.settings[name]
        for name, value in now.settings.items()
        if name in saved.settings and saved.settings[name] != value
    }
    return (
        (*saved.changes, {"until_step": step, "settings": before}) if before else (*saved.changes,)
    )


def _rates(record: RunRecord) -> str:
    return ", ".join(f"{rate:g} ({method})" for method, rate in record.rates.items())


def scored_on_other_rows(prepared: Prepared, checkpoint: Path | None) -> bool:
    """Whether the scores before a checkpoint are of other validation rows than the run has now."""
    saved = RunRecord.load(checkpoint) if checkpoint else None
    return saved is not None and saved.validation != _hash(prepared.validation)


def _hash(rows: Encoded | None) -> str | None:
    return None if rows is None else rows.content_hash
