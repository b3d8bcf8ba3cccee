"""The report of encoding: how many rows became samples, and how many were cut or dropped."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.config.rows import RowType

_INPUT = {"prompt": "prompt", "preference": "prompt"}
_OUTPUT = {
    "messages": "conversation",
    "text": "text",
    "prompt": "completion",
    "preference": "pair of answers",
}


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """How many rows were read, kept, dropped and cut, and how long they are in tokens."""

    source: str
    kind: RowType
    rows: int
    """Rows that were read."""
    kept: int
    """Rows to train on."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """How many rows were left out, by reason."""
    truncated_prompts: int = 0
    """Kept rows whose prompt, or text with labels, was cut."""
    truncated_completions: int = 0
    """Kept rows that lost target tokens: of a completion, a conversation or a text."""
    longest: int = 0
    """Tokens of the longest kept row."""
    mean: float = 0.0
    """Mean tokens of a kept row."""
    max_length: int
    """The limit in tokens: the configured one, or a smaller one of the tokenizer or model."""
    notes: tuple[str, ...] = ()
    """Remarks on the source, from reading its rows."""

    def __str__(self) -> str:
        """The report as a few plain lines."""
        read = f"{self.source}: {self.rows:,} {self.kind} rows read, {self.kept:,} kept"
        if self.kind == "image-classification":
            return "\n  ".join([read, *self.losses(), *self.notes])
        first = (
            f"{read}; tokens per row {self.mean:.1f} on average, {self.longest:,} at most"
            f" (limit {self.max_length:,})"
        )
        return "\n  ".join([first, *self.losses(), *self.notes])

    def losses(self) -> list[str]:
        """A line for each reason why rows were dropped, and for each part of rows that was cut."""
        lines = [f"dropped {_counted(count, 'row')}: {why}" for why, count in self.dropped.items()]
        if self.truncated_prompts:
            lines.append(f"cut {_counted(self.truncated_prompts, _INPUT.get(self.kind, 'text'))}")
        if self.truncated_completions:
            lines.append(f"cut {_counted(self.truncated_completions, _OUTPUT[self.kind])}")
        return lines


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")
