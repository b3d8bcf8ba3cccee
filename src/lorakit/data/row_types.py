"""The types of a row of data: a prompt, a conversation, a text, or a text with a label."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

RowType = Literal["prompt", "messages", "text", "classification"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """A prompt, and the answer that the model should give."""

    prompt: str
    completion: str
    """The answer to train on; empty in a row for generation alone."""
    references: tuple[str, ...] = ()
    """All good answers, where there are several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant, or another role that the chat template knows."""
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesRow:
    """A conversation."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRow:
    """A text without a task."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationRow:
    """A text, or a pair of texts, and its label."""

    text: str
    text_pair: str | None = None
    label: str | float
    """The name of a class, or the number to predict in a regression."""


Row: TypeAlias = PromptRow | MessagesRow | TextRow | ClassificationRow


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one type, read from one source."""

    kind: RowType
    rows: tuple[Row, ...]
    source: str
    """Where they came from, as the user named it."""
    labels: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None in every other task."""
    notes: tuple[str, ...] = ()
    """Remarks on the source, shown in the encoding's report."""

    def __len__(self) -> int:
        return len(self.rows)


def references_of(row: Row) -> tuple[str, ...]:
    """The texts that a generated answer to a row is compared with; none for some rows."""
    match row:
        case PromptRow():
            return row.references or ((row.completion,) if row.completion else ())
        case MessagesRow():
            last = row.messages[-1]
            return (last.content,) if last.role == "assistant" else ()
        case _:
            return ()
