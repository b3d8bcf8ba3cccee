"""Scores of a model, with or without an adapter, on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.adapter.adapter import AdapterSource
from lorakit.adapter.atomic_write import write_new_file
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.output_place import check_new
from lorakit.answering.answer import answer, warn
from lorakit.answering.beam_search import search_of
from lorakit.answering.scorers import BASIC, Scorers
from lorakit.attachment.open_model import ModelSource, Opened, opened_model
from lorakit.attachment.state import active_name, virtual_tokens
from lorakit.config.answering import BEAM_SETTINGS, EvaluateConfig
from lorakit.config.idle import changed
from lorakit.data.collate import Collator
from lorakit.data.encode import encode_prompt
from lorakit.data.objectives import OBJECTIVES, task_of_base
from lorakit.data.objectives.preference import check_reads_in_one_piece
from lorakit.data.row_types import LabelledRow, Row, Rows, references_of
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, DataError
from lorakit.models.load import model_name
from lorakit.models.tasks import check_does
from lorakit.training.evaluation import Scored, scored
from lorakit.training.loss import Loss
from lorakit.training.virtual_tokens import encode_for


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a model, and the rows that they are of."""

    rows: int
    source: str
    """Where the rows are from."""
    task: str
    scores: dict[str, float]
    scorers: dict[str, str]
    """What made a score, with its version and variant; formulas of one line are not named."""
    notes: tuple[str, ...]
    """What was cut or left out, and from which scores."""


def evaluate(
    *,
    adapter: AdapterSource | None = None,
    model: ModelSource | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, float]:
    """The scores of a model on held-out rows, with an adapter or without.

    Args:
        adapter: a folder, a hub id, or an `Adapter`. None: the model alone; a loaded one as it is.
        model: the base by name, or a loaded one, which is left as it was found. None: the base
            that the adapter was trained on.
        tokenizer: that of a loaded model.
        progress: show a bar on stderr.
        settings: those of `lorakit evaluate`, such as data=DataConfig(validation="rows.jsonl").

    Returns:
        `loss` (nats) and `perplexity`, `exact_match` (0 to 1) and `bleu` (0 to 100) of texts; of
        rows with labels `loss` and the scores of their task. Of rows of a task of the paper
        (data.validation: task:NAME) `loss`, `perplexity` of texts, and what `lk.score` has.

    Raises:
        LorakitError: a setting is wrong, or the model, the adapter or the rows cannot be used.

    Examples:
        >>> data = lk.DataConfig(validation="builtin:places:test", validation_rows=2)
        >>> scores = lk.evaluate(adapter="out/places", data=data, metrics=["loss"])
        >>> sorted(scores)
        ['loss', 'perplexity']
    """
    config = EvaluateConfig(**settings)
    found = evaluation(config, adapter, model, tokenizer, progress=progress)
    for note in found.notes:
        warn(note)
    return found.scores


def evaluation(
    config: EvaluateConfig,
    adapter: AdapterSource | None,
    model: ModelSource | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool,
) -> Evaluation:
    """The scores of `evaluate`, with what they are of."""
    if config.data.validation is None:
        raise ConfigError("data.validation must say which rows to score")
    scorers = Scorers(config)
    scorers.check()
    if config.outputs is not None:
        check_new(config.outputs)
    task = config.task and task_of_base(config.task)
    with opened_model(config, adapter, model, tokenizer, task=task, data=config.data) as opened:
        if config.task == "preference":
            opened = _comparing(opened)
        if opened.task in OBJECTIVES:
            OBJECTIVES[opened.task].check_library()
        check_does(model_name(opened.model), opened.model.config, task_of_base(opened.task))
        run = _Run(config, scorers, opened, _rows(opened), progress=progress)
        scores = run.scores_of_texts() if opened.task == "generation" else run.scores_of_labels()
    return Evaluation(
        rows=len(run.rows),
        source=run.rows.source,
        task=opened.task,
        scores=scores,
        scorers=scorers.made_by(scores),
        notes=tuple(run.notes),
    )


def _comparing(opened: Opened) -> Opened:
    """A model that writes texts, to compare answers with.

    Raises:
        ConfigError: it has no adapter, or one of virtual tokens, or two stacks.
    """
    if opened.adapter is None:
        raise ConfigError(
            "the task preference compares an adapter with its base, and there is no adapter: a base"
            " alone prefers nothing to itself"
        )
    check_reads_in_one_piece(opened.model)
    if virtual_tokens(opened.model, active_name(opened.model)) is not None:
        raise ConfigError(
            "the task preference does not go with virtual tokens, which are put into rows of one"
            " answer each"
        )
    return replace(opened, task="preference")


def _rows(opened: Opened) -> Rows:
    data = opened.data
    assert data.validation is not None
    return read_rows(
        data.validation,
        data,
        limit=data.validation_rows,
        every=data.validation_every,
        split="test",
        labels=opened.labels,
        task=opened.task,
        answered=False,
    )


class _Run:
    """One evaluation: its settings, its model, and its rows, which have been read."""

    def __init__(
        self,
        config: EvaluateConfig,
        scorers: Scorers,
        opened: Opened,
        rows: Rows,
        *,
        progress: bool,
    ) -> None:
        self._config, self._scorers, self._opened = config, scorers, opened
        self._progress = progress
        self.rows = rows
        self.notes = list(rows.notes)

    def scores_of_texts(self) -> dict[str, float]:
        """The loss of the rows, and the scores of the answers to their prompts."""
        asked = self._asked()
        if not asked:
            self._refuse_idle(["outputs", *_SEARCH])
        scores = self._losses().scores if "loss" in self._scorers.metrics else {}
        if not asked:
            return scores
        tokenizer, data = self._opened.tokenizer, self._opened.data
        two = self._opened.model.config.is_encoder_decoder
        prompts = [encode_prompt(row, tokenizer, data, encoder_decoder=two) for row in asked]
        answers = answer(
            self._opened.model,
            tokenizer,
            prompts,
            max_new_tokens=self._config.max_new_tokens,
            batch_size=self._config.batch_size,
            search=search_of(self._config),
            stop=self._config.stop,
            progress=self._progress,
            note=self.notes.append,
        )
        self._write(asked, [{"prompt": tokenizer.decode(prompt)} for prompt in prompts], answers)
        return scores | self._scorers.scores(asked, answers)

    def scores_of_labels(self) -> dict[str, float]:
        """The loss, and the scores of the predicted classes or numbers."""
        self._refuse_idle(_SEARCH)
        written = [name for name in self._config.metrics or () if name in BASIC]
        if written:
            raise ConfigError(
                f"metrics {', '.join(written)}: of texts that a model writes, and "
                f"{self._opened.task} has scores of its own: leave metrics out"
            )
        found, labels, rows = self._losses(), self._opened.labels, self.rows.rows
        objective = OBJECTIVES[self._opened.task]
        outputs = [objective.shown(answer, labels) for answer in found.predicted]
        self._write(rows, [row.texts for row in rows if isinstance(row, LabelledRow)], outputs)
        scores = found.scores
        if self._scorers.has_official:
            scores = {"loss": scores["loss"]} | self._scorers.official(rows, outputs)
        undefined = [name for name, value in scores.items() if math.isnan(value)]
        if undefined and "loss" not in undefined:
            self.notes.append(f"{' and '.join(undefined)}: not defined where all values are equal")
        return scores

    def _asked(self) -> list[Row]:
        """The rows to answer: those with references; none, where no score needs answers.

        Raises:
            DataError: no row has a reference.
            MissingExtraError: the library that computes a score is not installed.
        """
        rows, wanted = self.rows, self._scorers.of_answers
        if not wanted:
            return []
        asked = [row for row in rows.rows if references_of(row)]
        names = " and ".join(wanted)
        if not asked and not (rows.kind == "text" and "loss" in self._scorers.metrics):
            raise DataError(
                f"{rows.source}: none of its {len(rows)} {rows.kind} rows has an answer to compare"
                f" with, which {names} need: metrics: loss needs none"
            )
        if asked:
            self._scorers.check_libraries()
            self.notes += [f"left out: {error}" for error in self._scorers.missing.values()]
        if len(asked) < len(rows):
            self.notes.append(
                f"{names}: left out {len(rows) - len(asked):,} of {len(rows):,} rows, without an"
                " answer to compare with"
            )
        return asked

    def _refuse_idle(self, names: Sequence[str]) -> None:
        """Refuse settings of written answers where none are written.

        Raises:
            ConfigError: with the names of those that were given.
        """
        given = [name for name in names if name in changed(self._config)]
        if "outputs" in given:
            needed = " and ".join(BASIC)
            raise ConfigError(
                "outputs is a file for answers, and none are generated here: they are for the "
                f"metrics {needed} on rows with prompts"
            )
        if given:
            raise ConfigError(f"{' and '.join(given)}: of answers, and none are generated here")

    def _losses(self) -> Scored:
        opened = self._opened
        name = active_name(opened.model)
        card = opened.adapter.card if opened.adapter else {}
        encoded = encode_for(opened.model, name, self.rows, opened.tokenizer, opened.data)
        self.notes += [f"loss: {line}" for line in encoded.report.losses()]
        return scored(
            opened.model,
            encoded.examples,
            loss=Loss(opened.task, preference=TrainedUse.on(card).preference),
            collate=Collator(opened.tokenizer),
            batch_size=self._config.batch_size,
            names=opened.labels,
            progress=self._progress,
        )

    def _write(
        self, rows: Sequence[Row], texts: Sequence[Mapping[str, Any]], answers: Sequence[Any]
    ) -> None:
        """Write a line for each row: its texts, the answer, and what it is scored against."""
        if self._config.outputs is None:
            return
        lines = []
        for row, shown, found in zip(rows, texts, answers, strict=True):
            output = self._scorers.output(row, found)
            scored_as = {} if output == found else {"output": output}
            record = {
                **shown,
                "answer": found,
                **scored_as,
                "references": self._scorers.reference(row),
            }
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_new_file(self._config.outputs, "".join(lines).encode())


_SEARCH = ("num_beams", *BEAM_SETTINGS, "stop")
"""Settings of how answers are searched."""
