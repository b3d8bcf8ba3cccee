"""What a training card says of the use of its adapter; the rest of a card is for people to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit.config.base import problem_lines
from lorakit.config.rows import TaskName
from lorakit.config.train import DataConfig, PreferenceSettings
from lorakit.errors import AdapterFileError


def scores_of(card: Mapping[str, Any]) -> dict[str, str]:
    """The scores on a training card, as text; what is no number is left out."""
    scores = card.get("scores")
    known = scores if isinstance(scores, Mapping) else {}
    return {k: f"{value:.4g}" for k, value in known.items() if isinstance(value, int | float)}


class TrainedUse(BaseModel):
    """How an adapter is used: as it was trained."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    task: TaskName | None = None
    labels: tuple[str, ...] | None = None
    """Names of the classes, in the order of the head."""
    data: DataConfig = DataConfig()
    """How rows became samples."""
    preference: PreferenceSettings = PreferenceSettings()
    """How answers were compared, if they were."""
    rows_kind: str | None = None
    """What a row was, as the setting `data.format`; None: the card does not say."""
    end_tokens: tuple[int, ...] = ()
    """The tokens that ended the targets."""
    may_answer_nothing: bool = False
    """Whether questions that it was trained on had no answer."""
    chat_template: str | None = None
    """That of the tokenizer in the adapter's folder; None: the base's is used."""

    @classmethod
    def on(cls, card: Mapping[str, Any]) -> TrainedUse:
        """What a training card says; an empty one says nothing.

        Raises:
            AdapterFileError: the card has entries that training does not write; lists them.
        """
        try:
            return cls.model_validate(dict(card))
        except ValidationError as error:
            raise AdapterFileError.listing(
                "the adapter's training card cannot be used (lk.attach does without it)",
                problem_lines(cls, error),
            ) from None

    @property
    def says_how(self) -> bool:
        """Whether it says how the adapter is asked."""
        return self.rows_kind is not None or self.chat_template is not None

    @property
    def as_messages(self) -> bool:
        """Whether prompts go through the chat template: PEFT's files tell it only by having one."""
        if self.rows_kind is None:
            return self.chat_template is not None
        return self.rows_kind == "messages"
