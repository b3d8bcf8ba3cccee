"""What scores the answers to rows: exact match and BLEU, or the official scorer of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.config.answering import EvaluateConfig
from lorakit.data.metrics.basic import bleu, bleu_scorer, check_library, exact_match
from lorakit.data.metrics.score import check_scorer, score, score_names, scorer
from lorakit.data.row_types import Row, references_of
from lorakit.data.tasks import PREFIX, task_of
from lorakit.data.tasks.task import Task, reference_of
from lorakit.errors import ConfigError, MissingExtraError

BASIC: Mapping[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
}
"""The scores of any answers."""
OFFICIAL = "task"
"""The word for all scores of a task's official scorer."""


@dataclass(frozen=True)
class Scorers:
    """The scores that settings ask for."""

    config: EvaluateConfig

    @cached_property
    def task(self) -> Task | None:
        """The task of the paper that the rows are of."""
        source = self.config.data.validation
        return task_of(source)[0] if source is not None and source.startswith(PREFIX) else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are asked for, or the usual ones of the rows."""
        if self.config.metrics is not None:
            return tuple(self.config.metrics)
        usual = [name for name in BASIC if name not in self.missing]
        return ("loss", *([OFFICIAL] if self.task else usual))

    @cached_property
    def missing(self) -> Mapping[str, MissingExtraError]:
        """Of the usual scores those whose library is not installed; they are not asked for."""
        if self.config.metrics is not None or self.task:
            return {}
        found = {}
        for name in BASIC:
            try:
                check_library(name)
            except MissingExtraError as error:
                found[name] = error
        return found

    @property
    def of_answers(self) -> tuple[str, ...]:
        """The names of the scores for which the model writes answers."""
        return tuple(name for name in (*BASIC, OFFICIAL) if name in self.metrics)

    @property
    def has_official(self) -> bool:
        """Whether the task's official scorer is among them."""
        return self.task is not None and OFFICIAL in self.metrics

    def check(self) -> None:
        """Make sure that there are these scores, and that what computes them is installed.

        Raises:
            ConfigError: a metric is unknown, not of these rows, or there twice.
            DataError: there is no such task.
            MissingExtraError: a scorer's library or data is not installed.
        """
        unknown = sorted(set(self.metrics) - {"loss", *BASIC, OFFICIAL})
        if unknown:
            known = ", ".join(("loss", *BASIC, OFFICIAL))
            raise ConfigError(f"metrics: {unknown} unknown; there are {known}")
        official = [OFFICIAL] if OFFICIAL in self.metrics else []
        named = official + (["variant"] if self.config.variant is not None else [])
        if named and self.task is None:
            raise ConfigError(
                f"{' and '.join(named)}: of the official scorer of a task, and data.validation is"
                f" {self.config.data.validation}: a task is named as in {PREFIX}e2e"
            )
        if self.task is None or not official:
            return
        twice = [name for name in score_names(self.task.name) if name in self.metrics]
        if twice:
            raise ConfigError(
                f"metrics: {' and '.join(twice)} is among the scores of the task {self.task.name}"
                f" too: leave {OFFICIAL} or {' and '.join(twice)} out"
            )
        check_scorer(self.task.name, self.config.variant)

    def check_libraries(self) -> None:
        """Make sure that the libraries of the basic scores are installed.

        Raises:
            MissingExtraError: one is not.
        """
        for name in BASIC:
            if name in self.metrics:
                check_library(name)

    def scores(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, float]:
        """The scores of the answers to rows, each of which has references."""
        references = [references_of(row) for row in rows]
        found = {
            name: compute(answers, references)
            for name, compute in BASIC.items()
            if name in self.metrics
        }
        return found | (self.official(rows, answers) if self.has_official else {})

    def official(self, rows: Sequence[Row], answers: Sequence[Any]) -> dict[str, float]:
        """The scores of answers, or of predicted classes or numbers, by the task's scorer."""
        task = self.task
        assert task is not None
        return score(
            task.name,
            [self.output(*pair) for pair in zip(rows, answers, strict=True)],
            [self.reference(row) for row in rows],
            variant=self.config.variant,
            **task.beside(rows),
        )

    def output(self, row: Row, answer: Any) -> Any:
        """An answer in the form in which the scorer takes outputs."""
        return answer if self.task is None else self.task.output(answer, row)

    def reference(self, row: Row) -> Any:
        """The reference of a row in the form in which the scorer takes it."""
        return reference_of(row) if self.task is None else self.task.reference(row)

    def made_by(self, names: Iterable[str]) -> dict[str, str]:
        """The scorers of those scores that are not formulas of one line, with their versions."""
        found: dict[str, str] = {}
        if self.task is not None and self.has_official:
            official = scorer(self.task.name, self.config.variant)
            found |= dict.fromkeys(score_names(self.task.name), official)
        if "bleu" in self.metrics:
            found["bleu"] = bleu_scorer()
        return {name: found[name] for name in names if name in found}
