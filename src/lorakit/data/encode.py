"""Rows to samples: tokens and labels, with a count of what was cut or left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lorakit.config.train import DataConfig
from lorakit.data.chat import IGNORED, ChatTemplate, end_token
from lorakit.data.objectives import BY_KIND
from lorakit.data.objectives.objective import LabelEncoding
from lorakit.data.problems import Problems, UnusableRowError
from lorakit.data.report import EncodingReport
from lorakit.data.row_types import (
    WRITTEN,
    MessagesRow,
    PreferenceRow,
    PromptRow,
    Row,
    Rows,
    TextRow,
)
from lorakit.data.samples import Draft, Encoded, Example
from lorakit.errors import DataError

TOGETHER = 10_000
"""The number of rows that are tokenized at once: the tokenizer then uses all cores."""
NO_TARGET = "no target token within the limit"
NO_ANSWER = "no turn of the assistant that answers something"
NO_TRAINED_ANSWER = "no turn of the assistant that is to be trained"
NO_COMPLETION = "no completion"
ONLY_PROMPTS = (
    "its two stacks read a prompt and write a completion, and texts and conversations are in one"
    " piece"
)
"""Why other rows than prompts are not for an encoder-decoder."""


def encode_rows(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    longest: int | None = None,
    decoder_start: int | None = None,
) -> Encoded:
    """The samples of rows, of at most `data.max_length` tokens each.

    - A prompt row becomes the prompt, the separator, the completion and the end token, which is not
      added to a completion that has it; the last two are the target tokens. If it is too long, the
      prompt is cut from the left. If no token of the prompt would be left, the prompt keeps half of
      the limit and the completion is cut as well.
    - For an encoder-decoder the prompt is what the encoder reads, and the completion what the
      decoder writes, each with the special tokens that the tokenizer gives it, and each of at most
      so many tokens: one that is too long loses its end. There is no separator.
    - Of a conversation, the assistant's turns that are trained are the targets. One that is too
      long loses its end.
    - Of a text, all tokens are targets, and the end token, which is not added to a text that has
      it. One that is too long loses its end.
    - What a row with labels becomes is its objective's affair. Of a text or pair that is too long,
      the longer of the two is cut; words that are too many lose their end.

    Args:
        rows: the rows, as `read_rows` gives them.
        tokenizer: the model's.
        data: how rows become text.
        longest: another limit in tokens, from the model's context length. None: there is none.
        decoder_start: the token with which the decoder of an encoder-decoder begins. None: the
            model is none, or has a head for labels.

    Raises:
        DataError: no row is left, or rows or tokenizer do not allow it; lists the rows.
    """
    encoder = _Encoder(rows, tokenizer, data, longest=longest, decoder_start=decoder_start)
    problems = Problems(rows.source)
    drafts: list[Draft] = []
    for number, row in enumerate(rows.rows):
        if number % TOGETHER == 0:
            encoder.look_ahead(rows.rows[number : number + TOGETHER])
        try:
            drafts += encoder.drafts(row)
        except UnusableRowError as error:
            problems.add(f"row {number + 1}", str(error))
    problems.raise_if_any()
    report = _report(rows, drafts, limit=encoder.limit)
    if not report.kept:
        raise DataError(f"No row is left.\n{report}")
    examples = tuple(draft.example for draft in drafts if draft.example)
    ends = frozenset[int]().union(*(draft.ends for draft in drafts))
    return Encoded(examples=examples, report=report, ends=tuple(sorted(ends)))


def encode_prompt(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    encoder_decoder: bool = False,
) -> list[int]:
    """The tokens of a row's prompt, exactly as in training, never cut.

    The prompt of a conversation is all of it, but for the assistant's last turn if it ends with
    one; that of a text is the text.

    Raises:
        DataError: the row cannot be answered, or the tokenizer has no chat template.
    """
    if encoder_decoder:
        if not isinstance(row, PromptRow):
            raise DataError(f"An encoder-decoder answers a prompt alone: {ONLY_PROMPTS}.")
        return list(tokenizer(row.prompt, verbose=False)["input_ids"])
    match row:
        case PromptRow():
            text = row.prompt + data.separator
            return _openings(tokenizer, [text])[text]
        case TextRow():
            return _openings(tokenizer, [row.text])[row.text]
        case MessagesRow():
            try:
                return ChatTemplate(tokenizer).prompt(row)
            except UnusableRowError as error:
                raise DataError(f"A conversation cannot be answered: {error}.") from error
        case _:
            raise DataError("A row to classify has no prompt: it is answered with a label.")


class _Encoder:
    """Makes the samples of rows, one after the other."""

    def __init__(
        self,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        *,
        longest: int | None,
        decoder_start: int | None,
    ) -> None:
        limits = (data.max_length, tokenizer.model_max_length, longest)
        self.limit = min(limit for limit in limits if limit is not None)
        self._tokenizer = tokenizer
        self._separator = data.separator
        self._start = tokenizer.bos_token_id
        self._decoder_start = decoder_start if rows.kind in WRITTEN else None
        if self._decoder_start is not None and rows.kind != "prompt":
            raise DataError(
                f"{rows.source} has {rows.kind} rows, and the base is an encoder-decoder:"
                f" {ONLY_PROMPTS}. Give rows with prompt and completion."
            )
        self._openings: dict[str, list[int]] = {}
        numbers = {name: number for number, name in enumerate(rows.labels or ())}
        self._objective = BY_KIND.get(rows.kind)
        self._encoding = LabelEncoding(
            tokenizer=tokenizer,
            limit=self.limit,
            numbers=numbers,
            stride=data.stride,
            answered=self._answered,
        )
        self._chat = ChatTemplate(tokenizer) if rows.asked_as == "messages" else None
        framed = rows.kind not in (*WRITTEN, "image-classification")
        special = tokenizer.num_special_tokens_to_add(pair=True) if framed else 0
        if framed and self.limit <= special:
            raise DataError(
                f"data.max_length {self.limit} leaves no room for text beside the {special} tokens"
                " that frame it."
            )

    def look_ahead(self, rows: Sequence[Row]) -> None:
        """Tokenize the texts of rows at once, for the calls of `drafts` that follow."""
        if self._decoder_start is not None:
            return
        prompts = [row for row in rows if isinstance(row, PromptRow)]
        pairs = [row for row in rows if isinstance(row, PreferenceRow)]
        both = [each for row in pairs for each in (row.chosen, row.rejected)]
        prompts += [each for each in both if isinstance(each, PromptRow)]
        texts = [row.text for row in rows if isinstance(row, TextRow)]
        openings = [*(row.prompt + self._separator for row in prompts), *texts]
        # Later rows may have the same prompt (E2E: 9 answers to one). Texts that are cut may be
        # long, so they are not kept.
        known = {text: ids for text, ids in self._openings.items() if len(ids) <= self.limit}
        new = [text for text in openings if text not in known]
        self._openings = known | _openings(self._tokenizer, new)
        completions = [row.completion for row in prompts if row.completion is not None]
        self._completions = _plain(self._tokenizer, completions)

    @cached_property
    def _end(self) -> int:
        """The token that ends an answer, cached: tokenizers look it up by its text each time."""
        return end_token(self._tokenizer)

    def drafts(self, row: Row) -> list[Draft]:
        """The samples of a row, of which there is one, but for a long context of a question."""
        match row:
            case PromptRow() if self._decoder_start is not None:
                return [self._pair(row, self._decoder_start)]
            case PromptRow() | MessagesRow():
                return [self._answered(row)]
            case TextRow():
                ids = self._ended(self._openings[row.text])
                return [self._continuous(ids, list(ids))]
            case _:
                assert self._objective is not None, "rows of one kind"
                return self._objective.drafts(row, self._encoding)

    def _answered(self, row: PromptRow | MessagesRow) -> Draft:
        """The draft of a prompt with its answer, or of a conversation."""
        return self._prompt(row) if isinstance(row, PromptRow) else self._conversation(row)

    def _prompt(self, row: PromptRow) -> Draft:
        if row.completion is None:
            return Draft(dropped=NO_COMPLETION)
        prompt = self._openings[row.prompt + self._separator]
        completion = self._ended(self._completions[row.completion])
        # At least one token of the prompt stays: the first target token must follow a token.
        fits = len(completion) < self.limit
        room = self.limit - len(completion) if fits else self.limit // 2
        kept = last_tokens(prompt, room, start=self._start)
        targets = completion[: self.limit - len(kept)]
        if not kept or not targets:
            return Draft(dropped=NO_TARGET)
        return Draft(
            example=Example(input_ids=kept + targets, labels=[IGNORED] * len(kept) + targets),
            cut_prompt=len(kept) < len(prompt),
            cut_completion=len(targets) < len(completion),
            ends=frozenset({self._end}),
        )

    def _pair(self, row: PromptRow, start: int) -> Draft:
        """The draft of a prompt for the encoder, and a completion for the decoder.

        The decoder predicts each token of the completion from its start token and those before.
        """
        if row.completion is None:
            return Draft(dropped=NO_COMPLETION)
        prompt = self._tokenizer(row.prompt, verbose=False)["input_ids"]
        whole = self._tokenizer(text_target=row.completion, verbose=False)["input_ids"]
        whole = self._ended(whole)
        # Its start token takes up a place of the decoder.
        targets = whole[: self.limit - 1]
        if not prompt or not targets:
            return Draft(dropped=NO_TARGET)
        kept = prompt
        if len(prompt) > self.limit:
            cut = self._tokenizer(row.prompt, truncation=True, max_length=self.limit)
            kept = cut["input_ids"]
        return Draft(
            example=Example(
                input_ids=kept,
                labels=[IGNORED, *targets],
                decoder_input_ids=[start, *targets],
            ),
            cut_prompt=len(kept) < len(prompt),
            cut_completion=len(targets) < len(whole),
            ends=frozenset({self._end}),
        )

    def _ended(self, ids: list[int]) -> list[int]:
        """Tokens with the end token, which a text that ends with it has already."""
        return ids if ids[-1:] == [self._end] else [*ids, self._end]

    def _conversation(self, row: MessagesRow) -> Draft:
        assert self._chat is not None, "rows of one kind"
        found = self._chat.example(row)
        if found is None:
            spared = any(m.role == "assistant" and not m.trained for m in row.messages[1:])
            return Draft(dropped=NO_TRAINED_ANSWER if spared else NO_ANSWER)
        draft = self._continuous(found.ids, found.labels)
        return replace(draft, ends=found.ends, unwritten=found.unwritten)

    def _continuous(self, ids: list[int], labels: list[int]) -> Draft:
        """The draft of a text or conversation, whose end is cut."""
        kept = labels[: self.limit]
        # The first token is given, not predicted.
        if all(label == IGNORED for label in kept[1:]):
            return Draft(dropped=NO_TARGET)
        return Draft(
            example=Example(input_ids=ids[: self.limit], labels=kept),
            cut_completion=len(kept) < len(labels),
            ends=frozenset({ids[-1]}),
        )


def _openings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each text, with the tokenizer's start token but without its end token.

    A text that starts with the start token gets no second one. Equal texts share one list.
    """
    found = _tokens(tokenizer, texts, add_special_tokens=True)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    twice = [text for text, ids in found.items() if ids[:2] == [start, start]]
    written = {text for text, ids in _plain(tokenizer, twice).items() if ids[:2] != [start, start]}
    found = {text: ids[1:] if text in written else ids for text, ids in found.items()}
    ended = _plain(tokenizer, [text for text, ids in found.items() if ids[-1:] == [end]])
    added = {text for text, ids in ended.items() if ids[-1:] != [end]}
    return {text: ids[:-1] if text in added else ids for text, ids in found.items()}


def _plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, list[int]]:
    """The tokens of each text, without special tokens."""
    return _tokens(tokenizer, texts, add_special_tokens=False)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    if not distinct:
        return {}
    found = tokenizer(
        distinct,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return dict(zip(distinct, found["input_ids"], strict=True))


def last_tokens(ids: list[int], room: int, *, start: int | None) -> list[int]:
    """The last `room` tokens; a start token at the front is kept in place of the first of them."""
    if len(ids) <= room:
        return ids
    if ids[0] == start and room > 1:
        return [ids[0], *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def _report(rows: Rows, drafts: Sequence[Draft], *, limit: int) -> EncodingReport:
    lengths = [len(draft.example.input_ids) for draft in drafts if draft.example]
    return EncodingReport(
        source=rows.source,
        kind=rows.kind,
        rows=len(rows),
        kept=len(lengths),
        dropped=Counter(draft.dropped for draft in drafts if draft.dropped),
        truncated_prompts=sum(draft.cut_prompt for draft in drafts),
        truncated_completions=sum(draft.cut_completion for draft in drafts),
        longest=max(lengths, default=0),
        mean=sum(lengths) / max(len(lengths), 1),
        max_length=limit,
        notes=(*rows.notes, *_unwritten_note(drafts)),
    )


def _unwritten_note(drafts: Sequence[Draft]) -> tuple[str, ...]:
    counts = Counter(key for draft in drafts for key in sorted(draft.unwritten))
    if not counts:
        return ()
    keys = ", ".join(f"{key} ({count:,})" for key, count in counts.items())
    return (f"the chat template does not write these keys of messages (conversations): {keys}",)
