"""The results of a sweep, and its files: figures as JSON, a table, and a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.tensor_files import WEIGHTS_FILE
from lorakit.config.marks import settings_where
from lorakit.config.train import TrainConfig
from lorakit.errors import MissingExtraError, TrainingError
from lorakit.training.evaluation import BEST_BY
from lorakit.training.run import TrainResult
from lorakit.training.sweep import plot as sweep_plot
from lorakit.training.sweep.grid import Trial, word

FIGURES, TABLE, PLOT = "sweep.json", "sweep.md", "sweep.png"


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial."""

    trial: Trial
    trained: TrainResult | None = None
    """The result of its run; None if it is unfinished or was stopped."""
    error: BaseException | None = None
    """The error that stopped it."""

    @property
    def name(self) -> str:
        """The name of the trial and of its folder."""
        return self.trial.name

    @property
    def adapter(self) -> Adapter:
        """Its adapter, read from its folder when it is first asked for.

        Raises:
            TrainingError: the trial did not come to its end.
            AdapterFileError: the folder is gone, or not as it was written.
        """
        if self.trained is None:
            raise TrainingError(f"trial {self.name} is {self.status}: {self.error}")
        return self.trained.adapter

    @property
    def status(self) -> str:
        """One of finished, stopped, unfinished."""
        if self.trained is not None:
            return "finished"
        stopped = self.error is not None and not isinstance(self.error, KeyboardInterrupt)
        return "stopped" if stopped else "unfinished"

    @property
    def adapter_bytes(self) -> int:
        """The size of the adapter's weights file."""
        file = self.trial.config.out / WEIGHTS_FILE
        return file.stat().st_size if file.is_file() else 0


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """The result of a sweep."""

    config: TrainConfig
    trials: tuple[TrialResult, ...]
    seconds: float
    """Time in the training loops of all trials together, evaluation included."""

    @property
    def out(self) -> Path:
        """The sweep's folder."""
        return self.config.out

    @property
    def finished(self) -> dict[str, TrainResult]:
        """The results of the finished trials, by name."""
        return {each.name: each.trained for each in self.trials if each.trained is not None}

    @property
    def metric(self) -> str | None:
        """The validation score that all finished trials have, and by which they are compared."""
        scored = [set(trained.scores) for trained in self.finished.values()]
        common = set.intersection(*scored) if scored else set()
        # Classifiers have a loss as well, but accuracy decides: the loss is the last choice. Those
        # that have Matthews' correlation are of a task that goes by it.
        deciding = ["matthews", *sorted(BEST_BY.values(), key="loss".__eq__)]
        return next((name for name in deciding if name in common), None)

    def score(self, trained: TrainResult) -> float:
        """The score of a finished trial: its validation score, else its training loss."""
        return trained.scores[self.metric] if self.metric else trained.last_loss

    @property
    def score_name(self) -> str:
        """The name of the score, in words."""
        return f"validation {self.metric}" if self.metric else "training loss"

    @property
    def summary(self) -> str:
        """The results with a table, in Markdown that can be read as text too."""
        how = "together" if self.config.ray is None else "as tasks of a cluster"
        headline = (
            f"{len(self.trials)} adapters on {self.config.model}, trained {how} in "
            f"{self.seconds:.0f} s"
        )
        return "\n\n".join([headline, _table(self), *_notes(self)])


def write_figures(result: SweepResult) -> None:
    """Write all figures as JSON; a resumed sweep reads from it which trials are finished."""
    _put(result.out / FIGURES, json.dumps(figures(result), indent=1) + "\n")


def write_table_and_plot(result: SweepResult) -> None:
    """Write the table and, where matplotlib is installed, the plot."""
    _put(result.out / TABLE, f"# {result.summary}\n")
    points = [
        sweep_plot.TrialPoint(
            settings=each.trial.settings,
            parameters=each.trained.parameters,
            score=result.score(each.trained),
        )
        for each in result.trials
        if each.trained is not None
    ]
    if points and sweep_plot.is_available():
        title = f"{result.config.model}: {len(points)} adapters"
        sweep_plot.draw(points, result.out / PLOT, score_name=result.score_name, title=title)


def _put(file: Path, text: str) -> None:
    """Replace a file as a whole: a sweep that is killed leaves the file before."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def figures(result: SweepResult) -> dict[str, Any]:
    """All figures of a sweep as JSON values, with null for infinity."""
    data = {
        "model": result.config.model,
        "sweep": result.config.sweep,
        "score": result.score_name,
        "seconds": result.seconds,
        "members": [_trial_figures(result, each) for each in result.trials],
    }
    return to_jsonable_python(data, inf_nan_mode="null")


def _trial_figures(result: SweepResult, each: TrialResult) -> dict[str, Any]:
    return {
        "name": each.name,
        "settings": dict(each.trial.settings),
        "status": each.status,
        "error": str(each.error) if each.status == "stopped" else None,
        "score": result.score(each.trained) if each.trained else None,
        "adapter_bytes": each.adapter_bytes,
        "result": asdict(each.trained) | {"out": each.name} if each.trained else None,
        "config": _comparable(each.trial.config),
    }


def _comparable(config: TrainConfig) -> dict[str, Any]:
    compared = set(settings_where(TrainConfig, lambda mark: mark.compared))
    return config.model_dump(mode="json", include=compared)


def read_finished(out: Path, trials: Sequence[Trial]) -> dict[str, TrainResult]:
    """The results of the trials that a sweep's folder holds complete, with the same settings."""
    file = out / FIGURES
    if not file.is_file():
        return {}
    recorded = {each["name"]: each for each in json.loads(file.read_text("utf-8"))["members"]}
    return {
        trial.name: _read_result(trial, recorded[trial.name]["result"])
        for trial in trials
        if recorded.get(trial.name, {}).get("status") == "finished"
        and recorded[trial.name]["config"] == _comparable(trial.config)
        and (trial.config.out / WEIGHTS_FILE).is_file()
    }


def _read_result(trial: Trial, result: Mapping[str, Any]) -> TrainResult:
    scores = {name: float("inf") if v is None else v for name, v in result["scores"].items()}
    return TrainResult(**{**result, "out": trial.config.out, "scores": scores})


def _table(result: SweepResult) -> str:
    keys = list(result.trials[0].trial.settings)
    head = [*(key.rpartition(".")[2] for key in keys), "parameters", "file", result.score_name]
    rows = [["trial", *head, "best step" if result.metric else "steps"]]
    for each in result.trials:
        varied = [word(each.trial.settings[key]) for key in keys]
        rows.append([each.name, *varied, *_outcome(result, each)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def _outcome(result: SweepResult, each: TrialResult) -> list[str]:
    if each.trained is None:
        return ["", "", each.status, ""]
    step = each.trained.best_step if result.metric else each.trained.steps
    score = f"{result.score(each.trained):.4f}"
    return [f"{each.trained.parameters:,}", _size(each.adapter_bytes), score, str(step)]


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def _notes(result: SweepResult) -> list[str]:
    """The errors of stopped trials, and the reason where there is no plot."""
    lines = [f"{e.name} was stopped: {e.error}" for e in result.trials if e.status == "stopped"]
    if not sweep_plot.is_available():
        lines.append(f"No {PLOT}: {MissingExtraError('the plot', 'plots')}")
    return lines
