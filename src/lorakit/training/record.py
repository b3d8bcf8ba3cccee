"""The record of a run while it trains: JSON lines, and progress on stderr."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorakit.training.progress import PlainProgress, progress_bar

DROPPED = ("total_flos", "epoch")
"""Figures that transformers logs, and lorakit leaves out."""
SHOWN = ("loss", "eval_loss", "eval_accuracy", "eval_matthews", "eval_pearson")
"""Figures that the progress shows."""


class JsonLines(TrainerCallback):
    """Writes every logged figure as one line of `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with the lines that a resumed run had logged before its checkpoint."""
        self._path.write_text("".join(map(_line, state.log_history)))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the newest figures."""
        with self._path.open("a") as file:
            file.write(_line(state.log_history[-1]))


class LogWithScores(TrainerCallback):
    """Has the loss logged at the last step too, and at each after which rows are scored."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log after the last step, or one after which rows are scored."""
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a log where rows are scored after an epoch."""
        control.should_log |= control.should_evaluate


def _line(figures: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in figures.items() if k not in DROPPED}) + "\n"


class ProgressBar(TrainerCallback):
    """Shows steps, loss and learning rate on stderr."""

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._bar: tqdm[Any] | PlainProgress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step from which a resumed run continues."""
        self._bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            title="training",
            unit="step",
            show=self._show,
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by one step."""
        if self._bar is not None:
            self._bar.update(int(state.global_step - self._bar.n))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss or score."""
        shown = {k: f"{v:.4g}" for k, v in (logs or {}).items() if k in SHOWN}
        if self._bar is not None and shown:
            self._bar.set_postfix(shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


class SharedBar(TrainerCallback):
    """Shows the steps of several runs, which train jointly, together on stderr."""

    def __init__(self, *, runs: int, steps: int, done: int, show: bool) -> None:
        self._bar = progress_bar(
            total=steps, initial=done, title=f"training {runs} adapters", unit="step", show=show
        )

    def __enter__(self) -> SharedBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance by one step of one run."""
        self._bar.update()
