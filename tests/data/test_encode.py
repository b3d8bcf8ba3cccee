import pytest
from transformers import (
    AutoTokenizer,
    BatchEncoding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lorakit.config.rows import RowType
from lorakit.config.train import DataConfig
from lorakit.data.chat import IGNORED
from lorakit.data.encode import encode_prompt, encode_rows
from lorakit.data.row_types import (
    ClassificationRow,
    Message,
    MessagesRow,
    PromptRow,
    Row,
    Rows,
    TextRow,
)
from lorakit.data.samples import Encoded, Example
from lorakit.errors import DataError
from lorakit.models.packaged import packaged_folder
from tiny_tokenizers import build_tokenizer

Tokenizer = PreTrainedTokenizerFast
DATA = DataConfig(separator="=")


def encode(
    tokenizer: PreTrainedTokenizerBase, *rows: Row, kind: RowType = "prompt", max_length: int = 512
) -> Encoded:
    data = DataConfig(separator="=", max_length=max_length)
    return encode_rows(Rows(kind=kind, rows=rows, source="rows"), tokenizer, data)


def text_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode(example.input_ids))


def target_text(tokenizer: Tokenizer, example: Example) -> str:
    """The target tokens as text, with a bar where other tokens are between them."""
    assert isinstance(example.labels, list)
    assert len(example.labels) == len(example.input_ids)
    parts = [""]
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORED, token)
        if label == token:
            parts[-1] += str(tokenizer.decode([token]))
        elif parts[-1]:
            parts.append("")
    return "|".join(part for part in parts if part)


def prompt_row(prompt: str, completion: str) -> PromptRow:
    return PromptRow(prompt=prompt, completion=completion)


def test_only_the_completion_and_its_end_are_learnt(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, prompt_row("ab", "cd"))
    assert text_of(tokenizer, encoded[0]) == "ab=cd</s>"
    assert target_text(tokenizer, encoded[0]) == "cd</s>"


@pytest.mark.parametrize("ends", [False, True])
def test_rows_encoded_together_are_as_if_one_by_one(
    ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = build_tokenizer(ends=ends)
    rows = [prompt_row("a", "b"), prompt_row("ab", "b"), prompt_row("a", "c"), prompt_row("b", "")]
    alone = [encode(tokenizer, row)[0] for row in rows]
    assert list(encode(tokenizer, *rows).examples) == alone
    monkeypatch.setattr("lorakit.data.encode.TOGETHER", 3)
    assert list(encode(tokenizer, *rows).examples) == alone


def test_prompts_that_come_again_much_later_are_encoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    class Counting(PreTrainedTokenizerFast):
        def __call__(self, text: list[str], **kwargs: object) -> BatchEncoding:
            asked.extend(text)
            return super().__call__(text, **kwargs)

    tokenizer = build_tokenizer()
    tokenizer.__class__ = Counting
    monkeypatch.setattr("lorakit.data.encode.TOGETHER", 1)
    rows = [prompt_row(prompt, "x") for prompt in ("a", "bbbbbb", "a", "bbbbbb")]
    encode(tokenizer, *rows, max_length=4)
    assert asked.count("a=") == 1
    assert asked.count("bbbbbb=") == 2, "what is longer than the limit is not kept"


def test_a_completion_never_merges_with_its_prompt() -> None:
    tokenizer = build_tokenizer(merges=("==", "ab"))
    encoded = encode(tokenizer, prompt_row("ab", "=ab"))
    assert len(encoded[0].input_ids) == len(["ab", "=", "=", "ab", "</s>"])
    assert target_text(tokenizer, encoded[0]) == "=ab</s>"


def test_the_start_token_is_written_once_if_the_tokenizer_writes_one() -> None:
    tokenizer = build_tokenizer(starts=True)
    assert text_of(tokenizer, encode(tokenizer, prompt_row("a", "b"))[0]) == "<s>a=b</s>"
    text = encode(tokenizer, TextRow(text="ab"), kind="text")
    assert text_of(tokenizer, text[0]) == "<s>ab</s>"


def test_an_end_token_that_the_tokenizer_appends_does_not_end_the_prompt() -> None:
    tokenizer = build_tokenizer(ends=True)
    assert text_of(tokenizer, encode(tokenizer, prompt_row("a", "b"))[0]) == "a=b</s>"
    assert tokenizer.decode(encode_prompt(prompt_row("a", ""), tokenizer, DATA)) == "a="
    text = encode(tokenizer, TextRow(text="ab"), kind="text")
    assert text_of(tokenizer, text[0]) == "ab</s>"


def test_an_end_token_of_the_prompt_itself_stays(tokenizer: Tokenizer) -> None:
    data = DataConfig(separator="</s>")
    assert tokenizer.decode(encode_prompt(prompt_row("a", ""), tokenizer, data)) == "a</s>"


@pytest.mark.parametrize("starts", [False, True])
def test_a_prompt_is_encoded_to_be_answered_as_it_was_to_be_learnt(starts: bool) -> None:
    tokenizer = build_tokenizer(starts=starts, merges=("==",))
    rows: list[tuple[RowType, Row]] = [
        ("prompt", prompt_row("ab", "=cd")),
        ("messages", chat("user: Hi", "assistant: =Hello")),
    ]
    for kind, row in rows:
        example = encode(tokenizer, row, kind=kind)[0]
        prompt = encode_prompt(row, tokenizer, DATA)
        assert isinstance(example.labels, list)
        assert example.input_ids[: len(prompt)] == prompt
        assert set(example.labels[: len(prompt)]) == {IGNORED}
        assert example.labels[len(prompt)] != IGNORED


def test_a_long_prompt_loses_its_beginning(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, prompt_row("abcdef", "gh"), prompt_row("a", "b"), max_length=6)
    assert text_of(tokenizer, encoded[0]) == "ef=gh</s>"
    assert target_text(tokenizer, encoded[0]) == "gh</s>"
    assert (encoded.report.truncated_prompts, encoded.report.truncated_completions) == (1, 0)


def test_a_long_prompt_keeps_its_start_token() -> None:
    tokenizer = build_tokenizer(starts=True)
    row = prompt_row("abcdef", "gh")
    assert text_of(tokenizer, encode(tokenizer, row, max_length=6)[0]) == "<s>f=gh</s>"
    assert text_of(tokenizer, encode(tokenizer, row, max_length=4)[0]) == "=gh</s>"


def test_a_completion_is_cut_only_if_nothing_of_the_prompt_would_stay(tokenizer: Tokenizer) -> None:
    row = prompt_row("abc", "defgh")
    fitting = encode(tokenizer, row, max_length=7)
    assert text_of(tokenizer, fitting[0]) == "=defgh</s>"
    cut = encode(tokenizer, row, max_length=6)
    assert text_of(tokenizer, cut[0]) == "bc=def"
    assert target_text(tokenizer, cut[0]) == "def"
    assert (cut.report.truncated_prompts, cut.report.truncated_completions) == (1, 1)


def test_a_short_prompt_leaves_its_room_to_a_long_completion(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, prompt_row("a", "bcdefgh"), max_length=8)
    assert text_of(tokenizer, encoded[0]) == "a=bcdefg"
    assert (encoded.report.truncated_prompts, encoded.report.truncated_completions) == (0, 1)


@pytest.mark.parametrize("max_length", range(2, 16))
@pytest.mark.parametrize("starts", [False, True])
def test_no_example_is_longer_than_the_limit(max_length: int, starts: bool) -> None:
    tokenizer = build_tokenizer(starts=starts)
    for n in range(1, 8):
        row = prompt_row("p" * n, "c" * (8 - n))
        example = encode(tokenizer, row, max_length=max_length)[0]
        assert len(example.input_ids) == min(max_length, 10 + starts)
        assert "c" in target_text(tokenizer, example)


def test_the_tokenizers_own_limit_holds_too() -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 4
    encoded = encode(tokenizer, TextRow(text="abcdefgh"), kind="text")
    assert text_of(tokenizer, encoded[0]) == "abcd"
    assert encoded.report.max_length == 4


def test_every_token_of_a_text_is_learnt(tokenizer: Tokenizer) -> None:
    encoded = encode(
        tokenizer, TextRow(text="abc"), TextRow(text="abcdef"), kind="text", max_length=4
    )
    assert [target_text(tokenizer, example) for example in encoded.examples] == ["abc</s>", "abcd"]
    assert encoded.report.truncated_completions == 1


def test_rows_without_a_token_to_learn_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    encoded = encode(tokenizer, TextRow(text=""), TextRow(text="a"), kind="text")
    assert len(encoded) == 1
    assert encoded.report.dropped == {"no target token within the limit": 1}
    with pytest.raises(DataError, match=r"No row is left(.|\n)*dropped 1 row: no target token"):
        encode(tokenizer, prompt_row("a", "b"), max_length=1)


def test_an_answer_needs_an_end_token() -> None:
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        encode(build_tokenizer(eos_token=None), prompt_row("a", "b"))


def chat(*turns: str) -> MessagesRow:
    pairs = (turn.split(": ", 1) for turn in turns)
    return MessagesRow(messages=tuple(Message(role=role, content=text) for role, text in pairs))


def test_every_turn_of_the_assistant_is_learnt_to_its_end_token(tokenizer: Tokenizer) -> None:
    row = chat("system: S", "user: Hi", "assistant: Hello", "user: Bye", "assistant: Ciao")
    example = encode(tokenizer, row, kind="messages")[0]
    assert text_of(tokenizer, example) == (
        "<|system|>S<|end|>\n<|user|>Hi<|end|>\n<|assistant|>Hello<|end|>\n"
        "<|user|>Bye<|end|>\n<|assistant|>Ciao<|end|>\n"
    )
    assert target_text(tokenizer, example) == "Hello<|end|>|Ciao<|end|>"


def test_words_of_the_user_are_not_learnt_even_if_the_assistant_says_them_too(
    tokenizer: Tokenizer,
) -> None:
    example = encode(tokenizer, chat("user: Hi", "assistant: Hi"), kind="messages")[0]
    assert isinstance(example.labels, list)
    assert len([label for label in example.labels if label != IGNORED]) == len(
        ["H", "i", "<|end|>"]
    )
    assert target_text(tokenizer, example) == "Hi<|end|>"


def test_what_follows_the_last_answer_is_left_out(tokenizer: Tokenizer) -> None:
    row = chat("user: Hi", "assistant: Hello", "user: Bye")
    assert "Bye" not in text_of(tokenizer, encode(tokenizer, row, kind="messages")[0])
    assert tokenizer.decode(encode_prompt(row, tokenizer, DATA)).endswith(
        "Bye<|end|>\n<|assistant|>"
    )


def test_a_template_that_writes_the_start_token_gets_no_second() -> None:
    tokenizer = build_tokenizer(starts=True)
    tokenizer.chat_template = "<s>" + str(tokenizer.chat_template)
    example = encode(tokenizer, chat("user: a", "assistant: b"), kind="messages")[0]
    assert text_of(tokenizer, example).count("<s>") == 1


def test_an_answer_that_merges_with_its_heading_is_learnt_with_the_merged_token() -> None:
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<|end|>{% endfor %}"
    template += "{% if add_generation_prompt %}a:{% endif %}"
    tokenizer = build_tokenizer(merges=("::",), chat_template=template)
    example = encode(tokenizer, chat("user: x", "assistant: :y"), kind="messages")[0]
    assert target_text(tokenizer, example) == "::y<|end|>"


def test_a_template_without_an_end_of_turn_gets_the_end_token() -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = build_tokenizer(chat_template=template)
    row = chat("user: a", "assistant: b", "user: c", "assistant: d")
    assert target_text(tokenizer, encode(tokenizer, row, kind="messages")[0]) == "b\n|d\n</s>"


def test_conversations_without_an_answer_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows = (chat("user: a", "assistant: b"), chat("user: a"), chat("assistant: a", "user: b"))
    encoded = encode(tokenizer, *rows, kind="messages")
    assert len(encoded) == 1
    assert encoded.report.dropped == {"no turn of the assistant that answers something": 2}


def test_a_turn_that_opens_the_conversation_is_not_learnt(tokenizer: Tokenizer) -> None:
    row = chat("assistant: Welcome", "user: Hi", "assistant: Yes?")
    assert target_text(tokenizer, encode(tokenizer, row, kind="messages")[0]) == "Yes?<|end|>"


def test_a_long_conversation_loses_its_end(tokenizer: Tokenizer) -> None:
    row = chat("user: a", "assistant: b", "user: c", "assistant: d")
    first = len("?a?\n?b?")
    encoded = encode(tokenizer, row, kind="messages", max_length=first)
    assert target_text(tokenizer, encoded[0]) == "b<|end|>"
    assert encoded.report.truncated_completions == 1
    with pytest.raises(DataError, match="No row is left"):
        encode(tokenizer, row, kind="messages", max_length=first - 2)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if loop.last %}(last) {% endif %}"
        "{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.raises(
        DataError, match=r"row 1: the chat template writes message 2 in another way"
    ):
        encode(tokenizer, chat("user: a", "assistant: b"), kind="messages")


def test_messages_that_the_template_refuses_are_told_by_row() -> None:
    template = "{{ raise_exception('no ' + messages[0].role + ' here') }}"
    tokenizer = build_tokenizer(chat_template=template)
    row = chat("system: a", "assistant: b")
    with pytest.raises(DataError, match=r"row 1: the chat template refuses .*: no system here"):
        encode(tokenizer, row, kind="messages")
    with pytest.raises(DataError, match="no system here"):
        encode_prompt(row, tokenizer, DATA)


def test_messages_need_a_template() -> None:
    tokenizer = build_tokenizer(chat_template=None)
    row = chat("user: a", "assistant: b")
    for refused in (
        lambda: encode(tokenizer, row, kind="messages"),
        lambda: encode_prompt(row, tokenizer, DATA),
    ):
        with pytest.raises(DataError, match="has no chat template"):
            refused()


def test_a_conversation_is_answered_where_its_last_answer_began(tokenizer: Tokenizer) -> None:
    row = chat("user: Hi", "assistant: Hello")
    assert (
        tokenizer.decode(encode_prompt(row, tokenizer, DATA)) == "<|user|>Hi<|end|>\n<|assistant|>"
    )
    with pytest.raises(DataError, match="nothing precedes the assistant's turn"):
        encode_prompt(chat("assistant: Hello"), tokenizer, DATA)


def test_a_text_is_continued_and_a_label_is_not_written(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(encode_prompt(TextRow(text="ab"), tokenizer, DATA)) == "ab"
    with pytest.raises(DataError, match="answered with a label"):
        encode_prompt(ClassificationRow(text="a", label="b"), tokenizer, DATA)


def labelled(text: str, label: str | float, pair: str | None = None) -> ClassificationRow:
    return ClassificationRow(text=text, text_pair=pair, label=label)


def test_a_class_becomes_its_number_and_a_number_stays() -> None:
    tokenizer = build_tokenizer(starts=True, ends=True)
    rows = Rows(
        kind="classification",
        rows=(labelled("a", "pos"), labelled("b", "neg"), labelled("", "pos")),
        source="rows",
        labels=("neg", "pos"),
    )
    examples = encode_rows(rows, tokenizer, DATA).examples
    assert [example.labels for example in examples] == [1, 0, 1]
    assert [text_of(tokenizer, e) for e in examples] == ["<s>a</s>", "<s>b</s>", "<s></s>"]
    encoded = encode(tokenizer, labelled("a", 2.5), kind="classification")
    assert encoded[0].labels == 2.5


def test_the_longer_text_of_a_pair_is_cut() -> None:
    tokenizer = build_tokenizer()
    rows = (labelled("abcdef", 1.0, "gh"), labelled("a", 1.0, "b"))
    encoded = encode(tokenizer, *rows, kind="classification", max_length=5)
    assert [text_of(tokenizer, example) for example in encoded.examples] == ["abcgh", "ab"]
    assert encoded.report.truncated_prompts == 1
    assert "cut 1 text" in str(encoded.report)


@pytest.fixture(scope="module")
def minilm() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(packaged_folder("minilm"))


def test_a_pair_is_framed_and_told_apart_as_its_model_wants(
    minilm: PreTrainedTokenizerBase,
) -> None:
    encoded = encode(
        minilm, labelled("a cat", 1.0, "a dog"), labelled("a", 2.0), kind="classification"
    )
    assert text_of(minilm, encoded[0]) == "[CLS] a cat [SEP] a dog [SEP]"
    assert encoded[0].token_type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert text_of(minilm, encoded[1]) == "[CLS] a [SEP]"
    assert encoded.report.max_length == 512
    with pytest.raises(DataError, match="has no end-of-sequence token"):
        encode(minilm, prompt_row("a", "b"))


def test_a_limit_without_room_for_text_is_refused() -> None:
    tokenizer = build_tokenizer(starts=True, ends=True)
    with pytest.raises(DataError, match="leaves no room for text"):
        encode(tokenizer, labelled("a", 1.0), kind="classification", max_length=2)


def test_the_report_counts_what_became_of_the_rows(tokenizer: Tokenizer) -> None:
    rows = Rows(
        kind="prompt",
        rows=(prompt_row("a", "b"), prompt_row("abcdefgh", "c"), prompt_row("a", "bcdefghi")),
        source="my.jsonl",
        notes=("a note",),
    )
    report = encode_rows(rows, tokenizer, DataConfig(separator="=", max_length=7)).report
    assert str(report) == (
        "my.jsonl: 3 prompt rows read, 3 kept; tokens per row 6.0 on average, 7 at most (limit 7)\n"
        "  cut 1 prompt\n"
        "  cut 1 completion\n"
        "  a note"
    )
