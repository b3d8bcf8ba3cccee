"""An objective: what a task with labels makes of rows, from reading them to scoring answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.config.rows import RowField, RowType
from lorakit.data.fields import FieldMap
from lorakit.data.row_types import MessagesRow, PromptRow, Row
from lorakit.data.samples import Draft, Example

Values: TypeAlias = Mapping[str, Any]
"""The values of a raw row by column."""
Names: TypeAlias = tuple[str, ...] | None
"""The names of the classes, in the order of their numbers; None: there are none, or none yet."""


@dataclass(frozen=True, kw_only=True)
class LabelEncoding:
    """What rows with labels are encoded with."""

    tokenizer: PreTrainedTokenizerBase
    limit: int
    """The most tokens of a sample."""
    numbers: Mapping[str, int]
    """The number of each class, by its name."""
    stride: int
    """The tokens that neighbouring windows of a text share."""
    answered: Callable[[PromptRow | MessagesRow], Draft]
    """The sample of a prompt and an answer, or of a conversation, as rows of these become it."""


class Objective(ABC):
    """What one task with labels makes of rows."""

    task: ClassVar[str]
    """The value of the setting `task`."""
    of_base: ClassVar[str] = ""
    """The task that the base is loaded for, and that the adapter then does; "": the same."""
    kind: ClassVar[RowType]
    """The type of its rows."""
    needed: ClassVar[tuple[RowField, ...]]
    """The fields that its rows need."""
    optional: ClassVar[tuple[RowField, ...]] = ()
    """The fields that its rows may have besides."""
    right: ClassVar[tuple[RowField, ...]] = ("label",)
    """The fields that say what is right of a row."""
    best_by: ClassVar[str]
    """The score that decides which adapter is the best."""
    has_classes: ClassVar[bool] = True
    """Whether labels are names of classes."""
    smooths: ClassVar[bool] = True
    """Whether its loss has label smoothing and z-loss: classes that exclude each other."""
    unjoined: ClassVar[str] = "reads one token of each row"
    """Why the rows of a batch are not joined."""

    @abstractmethod
    def row(self, fields: FieldMap, values: Values, known: Names) -> Row:
        """The row of a raw one.

        Args:
            fields: the column of each field.
            values: the raw row's values by column.
            known: the names of the classes; None: any name is one.

        Raises:
            UnusableRowError: it cannot be used; says why.
        """

    def stand_in(self, fields: FieldMap, values: Values, known: Names) -> dict[RowField, Any]:
        """What takes the place of the fields `right` in a row of which nobody knows what is right.

        Raises:
            UnusableRowError: it lacks what it is to be answered from.
        """
        return {"label": known[0] if known else 0}

    def may_answer_nothing(self, examples: Sequence[Example]) -> bool:
        """Whether some rows have nothing that is right, so that nothing may be predicted."""
        return False

    def without_answers(self, rows: Sequence[Any]) -> list[Any]:
        """Rows to answer, of which nothing may be predicted where the task knows that."""
        return list(rows)

    def names(self, row: Any) -> Iterable[str]:
        """The names of the classes that occur in a row."""
        return ()

    @abstractmethod
    def draft(self, row: Any, encoding: LabelEncoding) -> Draft:
        """The sample of a row.

        Raises:
            UnusableRowError: it cannot be encoded.
        """

    def drafts(self, row: Any, encoding: LabelEncoding) -> list[Draft]:
        """The samples of a row, where it may have several."""
        return [self.draft(row, encoding)]

    def unlike(self, rows: Sequence[Any]) -> Iterable[tuple[int, str]]:
        """The number of each row that does not go with the others, and why."""
        return ()

    def needs_others(self, rows: Sequence[Any]) -> bool:
        """Whether the loss of a row is 0 where its batch has no other."""
        return False

    def best_of(self, rows: Sequence[Any]) -> str:
        """The score that decides which adapter is the best on these held-out rows."""
        return self.best_by

    def outputs(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """What a model says of a batch without labels, a row for each of the batch's."""
        found: Tensor = model(**inputs).logits
        return found

    @abstractmethod
    def loss(
        self, outputs: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
    ) -> Tensor:
        """The sum of the losses of a batch, in float32."""

    def count(self, labels: Tensor) -> int:
        """The number of items of a batch that a mean loss is over."""
        return len(labels)

    @abstractmethod
    def answers(self, outputs: Tensor, labels: Tensor) -> list[Any]:
        """What is predicted of each sample of a batch."""

    def probabilities(self, outputs: Tensor) -> Tensor | None:
        """The probability of each class, (rows, classes); None: it has no classes of whole rows."""
        return None

    def combined(self, answers: Sequence[Any], examples: Sequence[Example]) -> list[Any]:
        """What is predicted of each row, from what is predicted of its samples."""
        return list(answers)

    def check_library(self) -> None:  # noqa: B027 - most scores need none.
        """Make sure that what computes the scores is installed.

        Raises:
            MissingExtraError: it is not.
        """

    @abstractmethod
    def scores(
        self,
        answers: Sequence[Any],
        examples: Sequence[Example],
        *,
        names: Names,
        best_by: str | None = None,
    ) -> dict[str, float]:
        """The scores of what was predicted.

        Args:
            answers: what was predicted of each row.
            examples: the samples, with their labels.
            names: the names of the classes.
            best_by: a score that is asked for beside the usual ones.
        """

    @abstractmethod
    def shown(self, answer: Any, names: Names) -> Any:
        """An answer as it is written to a file, as JSON: classes by their names."""
