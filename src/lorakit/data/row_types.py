"""The types of a row of data: a prompt, a conversation, a text, or a text with labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from lorakit.config.rows import RowType

CALLS = ("tool_calls", "function_call")
"""The keys of a message that calls a tool."""

WRITTEN: tuple[RowType, ...] = ("messages", "prompt", "text")
"""The types of rows from which a model learns to write texts; others have labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """A prompt, and the answer that the model should give."""

    prompt: str
    completion: str | None
    """The answer to train on, which may be empty; None: the row is for generation alone."""
    references: tuple[str, ...] = ()
    """All good answers, where there are several."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What the scorer of a task needs to know of the row beside its texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """system, user, assistant, or another role that the chat template knows."""
    content: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template may write of it, such as tool_calls or reasoning_content."""
    trained: bool = True
    """Whether it is a target, if it is the assistant's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MessagesRow:
    """A conversation."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    """The tools that the assistant may call, each as its JSON schema."""


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

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return _texts(self.text, self.text_pair)

    @property
    def reference(self) -> str | float:
        """The right answer, for a file of answers."""
        return self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiLabelRow:
    """A text, or a pair of texts, and all of its classes."""

    text: str
    text_pair: str | None = None
    labels: tuple[str, ...]
    """The names of the classes, in any order; none: it is of no class."""

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return _texts(self.text, self.text_pair)

    @property
    def reference(self) -> list[str]:
        """The right answer, for a file of answers."""
        return list(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggedRow:
    """Words, each with the tag that is its class."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return {"words": list(self.words)}

    @property
    def reference(self) -> list[str]:
        """The right answer, for a file of answers."""
        return list(self.tags)


class GoldAnswer(NamedTuple):
    """A part of a context that answers a question."""

    text: str
    start: int
    """Its first character in the context."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionRow:
    """A question, and its answers in a text."""

    question: str
    context: str
    answers: tuple[GoldAnswer, ...]
    """The first is trained on; none: the text does not answer the question."""

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return {"question": self.question, "context": self.context}

    @property
    def reference(self) -> list[str]:
        """The right answers, for a file of answers."""
        return [answer.text for answer in self.answers]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """Two texts that belong together, or a number that says how much they do."""

    text: str
    text_pair: str
    negative: str | None = None
    """A text that does not belong to the first."""
    label: float | None = None

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return _texts(self.text, self.text_pair)

    @property
    def reference(self) -> float | None:
        """The right answer, for a file of answers."""
        return self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """The file of an image, and the name of its class."""

    image: str
    label: str

    @property
    def texts(self) -> dict[str, Any]:
        """What it is, for a file of answers."""
        return {"image": self.image}

    @property
    def reference(self) -> str:
        """The right answer, for a file of answers."""
        return self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRow:
    """A prompt with two answers of which one is preferred: two texts, or two conversations."""

    chosen: PromptRow | MessagesRow
    """The prompt with the preferred answer."""
    rejected: PromptRow | MessagesRow
    """The same prompt with the other answer."""
    asked: int = 0
    """Of conversations, the messages at their start that are the prompt."""

    @property
    def texts(self) -> dict[str, Any]:
        """What it says, for a file of answers."""
        return {"prompt": self._part(self.chosen, 0), "rejected": self._part(self.rejected, 1)}

    @property
    def reference(self) -> Any:
        """The preferred answer, for a file of answers."""
        return self._part(self.chosen, 1)

    def _part(self, row: PromptRow | MessagesRow, part: int) -> Any:
        """The prompt (0) or the answer (1) of a row, as JSON."""
        if isinstance(row, PromptRow):
            return (row.prompt, row.completion)[part]
        turns = (row.messages[: self.asked], row.messages[self.asked :])[part]
        return [{"role": each.role, "content": each.content, **each.keys} for each in turns]


LabelledRow: TypeAlias = (
    ClassificationRow | MultiLabelRow | TaggedRow | QuestionRow | PairRow | PreferenceRow | ImageRow
)
"""A row with labels, of which an objective knows what they mean."""
Row: TypeAlias = PromptRow | MessagesRow | TextRow | LabelledRow


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

    @property
    def task(self) -> str:
        """The task that rows of this type are for, if they are not for a regression."""
        return "generation" if self.kind in WRITTEN else self.kind

    @property
    def asked_as(self) -> RowType:
        """The type of rows whose prompts are written as those of these rows are."""
        match self.rows:
            case (PreferenceRow(chosen=MessagesRow()), *_):
                return "messages"
            case (PreferenceRow(), *_):
                return "prompt"
            case _:
                return self.kind

    def __len__(self) -> int:
        return len(self.rows)


def _texts(text: str, pair: str | None) -> dict[str, Any]:
    return {"text": text, **({} if pair is None else {"text_pair": pair})}


def calls_tool(message: Message) -> bool:
    """Whether a turn calls a tool, in place of a text or after it."""
    return any(key in message.keys for key in CALLS)


def references_of(row: Row) -> tuple[str, ...]:
    """The texts that a generated answer to a row is compared with; none for some rows.

    An empty completion is the reference "". A turn that calls a tool has none: how it is written is
    the chat template's affair.
    """
    match row:
        case PromptRow():
            return row.references or (() if row.completion is None else (row.completion,))
        case MessagesRow():
            last = row.messages[-1]
            return (last.content,) if last.role == "assistant" and not calls_tool(last) else ()
        case _:
            return ()
