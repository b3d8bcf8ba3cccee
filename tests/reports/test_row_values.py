"""Values and keys of rows that were dropped or changed without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorakit.config.train import DataConfig
from lorakit.data.chat import IGNORED
from lorakit.data.encode import encode_prompt, encode_rows
from lorakit.data.row_types import Message, MessagesRow, PromptRow, Rows
from lorakit.data.rows import read_rows
from lorakit.data.samples import Encoded
from lorakit.errors import DataError
from tiny_tokenizers import build_tokenizer

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WEATHER = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """A function that reads rows from a file of JSON lines."""

    def write_and_read(*rows: dict[str, Any] | str, **settings: Any) -> Rows:
        path = tmp_path / "rows.jsonl"
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text("\n".join(lines))
        return read_rows(str(path), DataConfig(**settings))

    return write_and_read


@pytest.fixture
def encode(read: Any) -> Any:
    """A function that gives the text of each row and the text of its targets, turn by turn."""

    def encode(
        *messages: dict[str, Any], tools: Any = None, template: str = TEMPLATE
    ) -> tuple[str, list[str], Encoded]:
        tokenizer = build_tokenizer(chat_template=template)
        rows = read({"messages": list(messages), "tools": tools})
        encoded = encode_rows(rows, tokenizer, DataConfig())
        ids, labels = encoded[0].input_ids, encoded[0].labels
        return str(tokenizer.decode(ids)), _targets(tokenizer, labels), encoded

    return encode


def _targets(tokenizer: PreTrainedTokenizerFast, labels: Any) -> list[str]:
    turns: list[list[int]] = [[]]
    for label in labels:
        if label != IGNORED:
            turns[-1].append(label)
        elif turns[-1]:
            turns.append([])
    return [str(tokenizer.decode(turn)) for turn in turns if turn]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "completion": NaN}', "there is no completion; it has prompt"),
        ('{"prompt": Infinity, "completion": "b"}', "prompt is inf, where a text is needed"),
        ('{"text": NaN}', "there is no text"),
        ('{"text": "a", "label": NaN}', "the label is missing"),
        ('{"prompt": "a", "references": ["b", NaN]}', "references is nan, where a text is needed"),
        (
            '{"messages": [{"role": "user", "content": NaN}]}',
            "content of message 1 is null, where a text is needed",
        ),
        ('{"prompt": "a", "prompt": "z", "completion": "b"}', "the key 'prompt' is there twice"),
        (
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "the key 'content' is there twice",
        ),
    ],
)
def test_a_value_that_is_none_is_no_text(read: Any, row: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"line 1: (malformed JSON: )?{message}"):
        read(row)


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_turn_that_is_not_to_be_trained_is_no_target(encode: Any, key: str) -> None:
    first = ANSWER | {"content": "skipped", key: 0}
    text, targets, _ = encode(USER, first, USER, ANSWER | {key: 1})
    assert "skipped" in text
    assert targets == ["b<|end|>"]


def test_a_conversation_without_a_turn_to_train_is_left_out_and_counted(read: Any) -> None:
    untrained = {"messages": [USER, ANSWER | {"weight": 0}]}
    rows = read(untrained, {"messages": [USER, ANSWER]})
    encoded = encode_rows(rows, build_tokenizer(), DataConfig())
    assert encoded.report.dropped == {"no turn of the assistant that is to be trained": 1}


def test_flags_that_contradict_each_other_are_refused(read: Any) -> None:
    with pytest.raises(DataError, match="message 2 has weight and train, and a turn is trained"):
        read({"messages": [USER, ANSWER | {"weight": 1, "train": False}]})


def test_reasoning_is_a_target_where_the_template_writes_it(encode: Any) -> None:
    _, targets, encoded = encode(USER, ANSWER | {"reasoning_content": "think"})
    assert targets == ["(think)b<|end|>"]
    assert "does not write" not in str(encoded.report)


def test_keys_that_the_template_does_not_write_are_named_and_counted(encode: Any) -> None:
    _, targets, encoded = encode(USER | {"name": "x"}, ANSWER | {"refusal": None, "mood": "good"})
    assert targets == ["b<|end|>"]
    lost = "the chat template does not write these keys of messages (conversations): "
    assert encoded.report.notes == (f"{lost}mood (1), name (1)",)


def test_tools_and_their_calls_are_written_by_the_template(encode: Any) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text, targets, _ = encode(
        USER, calls, {"role": "tool", "content": "42"}, ANSWER, tools=[WEATHER]
    )
    assert text.startswith('<|system|>[{"type": "function", "function": {"name": "f", "parameters"')
    assert "<|user|>42<|end|>" in text
    assert targets == ['f{"x": 1}<|end|>', "b<|end|>"]


def test_a_template_that_appends_arguments_to_a_text_gets_them_as_text(encode: Any) -> None:
    template = TEMPLATE.replace(
        "{{ call.function.name }}{{ call.function.arguments | tojson }}",
        "{{ call.function.name + call.function.arguments }}",
    )
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert encode(USER, calls, template=template)[1] == ['f{"x": 1}<|end|>']


def test_tools_that_the_template_does_not_write_are_refused(encode: Any) -> None:
    plain = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    with pytest.raises(DataError, match="the chat template does not write tools: use a model"):
        encode(USER, ANSWER, tools=[WEATHER], template=plain)
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(DataError, match="the chat template does not write tool_calls"):
        encode(USER, calls, template=plain)
    row = MessagesRow(messages=(Message(role="user", content="a"),), tools=(WEATHER,))
    with pytest.raises(DataError, match="the chat template does not write tools"):
        encode_prompt(row, build_tokenizer(chat_template=plain), DataConfig())


def test_text_after_a_special_token_of_a_turn_is_a_target_too(encode: Any) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    _, targets, _ = encode(USER, ANSWER | {"content": "x<|end|>y"}, template=template)
    assert targets == ["x<|end|>y\n</s>"]


def test_the_text_parts_of_a_content_follow_each_other(encode: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text, _, _ = encode(USER | {"content": parts}, ANSWER)
    assert "<|user|>ab<|end|>" in text


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"role": "User", "content": "a"}, {"role": "model", "content": "b"}]},
        {"messages": json.dumps([USER, ANSWER])},
    ],
)
def test_conversations_of_other_layouts_are_messages(read: Any, row: dict[str, Any]) -> None:
    (found,) = read(row).rows
    assert [(m.role, m.content, m.trained) for m in found.messages] == [
        ("user", "a", True),
        ("assistant", "b", True),
    ]


@pytest.mark.parametrize("completion", [[ANSWER], "b"])
def test_of_prompts_that_are_messages_only_the_completion_is_trained(
    read: Any, completion: object
) -> None:
    prompt = [USER, ANSWER | {"content": "not this"}, USER]
    rows = read({"prompt": prompt, "completion": completion})
    tokenizer = build_tokenizer()
    encoded = encode_rows(rows, tokenizer, DataConfig())
    assert _targets(tokenizer, encoded[0].labels) == ["b<|end|>"]


ALPACA = [
    {"instruction": "Do", "input": "x", "output": "y"},
    {"instruction": "Do", "input": "", "output": "y"},
    {"instruction": "Do", "output": "y"},
    {"instruction": "Do", "input": None, "output": "y"},
]


@pytest.mark.parametrize(
    "fields", [{}, {"prompt": "{instruction}\n{input?}", "completion": "output"}]
)
def test_an_alpaca_row_may_lack_its_input(read: Any, fields: dict[str, str]) -> None:
    rows = read(*ALPACA, fields=fields)
    assert rows.rows == tuple(
        PromptRow(prompt=prompt, completion="y") for prompt in ("Do\nx", "Do", "Do", "Do")
    )
    note = "the prompt is instruction and input, the completion is output"
    assert rows.notes == (() if fields else (note,))


def test_a_column_of_a_template_may_be_missing_only_where_the_template_says_so(read: Any) -> None:
    with pytest.raises(DataError, match=r"line 3: there is no prompt \(\{instruction\}"):
        read(*ALPACA, fields={"prompt": "{instruction}\n{input}", "completion": "output"})


def test_columns_that_are_not_read_are_named(read: Any) -> None:
    rows = read({"id": 1, "text": "full", "prompt": "a", "completion": "b"})
    assert rows.notes == ("columns that are not read: id, text",)
    rows = read({"weight": 0, "messages": [USER, ANSWER]})
    assert rows.notes == ("columns that are not read: weight",)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (1e-05, "label 1e-05 is a fraction: set task: regression"),
        ("1e-3", "label 1e-3 is a fraction"),
        (float("inf"), "label is inf"),
        ("NaN", "label NaN stands for a missing one"),
        ([0, 1], "label is a list of 2, and a row has one class"),
        (["x"], "label is a list of 1, and a row has one class"),
    ],
)
def test_a_label_that_is_no_class_is_refused(read: Any, label: object, message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        read({"text": "a", "label": label}, {"text": "b", "label": 0}, {"text": "c", "label": 1})


def test_codes_and_listed_names_are_classes(read: Any) -> None:
    assert read({"text": "a", "label": "2E10"}, {"text": "b", "label": "X"}).labels == ("2E10", "X")
    assert len(read({"text": "a", "label": "nan"}, labels=("nan", "roti"))) == 1


def test_a_number_to_predict_may_not_be_missing(read: Any, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a", "label": NaN}\n{"text": "b", "label": Infinity}\n')
    with pytest.raises(DataError) as error:
        read_rows(str(path), DataConfig(), task="regression")
    assert "line 1: the label is missing" in str(error.value)
    assert "line 2: label is inf, where a finite number is needed" in str(error.value)
