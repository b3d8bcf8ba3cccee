"""Chat models whose turns end in another token than the tokenizer's: Gemma-it, Phi-3, Qwen2.5."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit as lk
from lorakit.answering.answer import generation_settings, text_of
from lorakit.answering.ends import end_tokens, ends_of_rows
from lorakit.cli.main import main
from lorakit.config.rows import RowType
from lorakit.config.train import DataConfig
from lorakit.data.encode import encode_rows
from lorakit.data.row_types import PromptRow, Rows, TextRow
from tiny_tokenizers import build_tokenizer

ASKED = {"capital of France?": "Paris", "two plus two?": "four"}
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
    for q, a in ASKED.items()
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 8))
    return path


def _base(folder: Path, *, listed: bool) -> Path:
    """A model whose tokenizer ends a text with </s>, and whose template ends turns with <|end|>."""
    tokenizer = build_tokenizer(pad_token="</s>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=128, **shape
    )
    model = LlamaForCausalLM(config)
    end, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|end|>"))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [end, turn] if listed else end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("listed", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_an_answer_ends_where_the_trained_turns_ended(
    listed: bool, rows: Path, tmp_path: Path
) -> None:
    base = _base(tmp_path / "base", listed=listed)
    words = ["train", "--model", base, "--out", tmp_path / "out", "--data.train", rows]
    schedule = ["--steps", 40, "--batch-size", 8, "--learning-rate", 0.02, "--warmup-steps", 2]
    more = ["--method", "full", "--dtype", "float32", "--json"]
    assert main([str(word) for word in (*words, *schedule, *more)]) == 0
    tokenizer = build_tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|end|>")
    adapter = lk.Adapter.load(tmp_path / "out")
    assert adapter.card["end_tokens"] == [turn]
    assert lk.generate(list(ASKED), adapter=adapter, max_new_tokens=20) == list(ASKED.values())
    data = DataConfig(validation=str(rows), validation_rows=2)
    scores = lk.evaluate(adapter=adapter, data=data, metrics="exact_match", max_new_tokens=20)
    assert scores == {"exact_match": 1.0}
    merged = tmp_path / "merged"
    words = ["merge", "--adapter", tmp_path / "out", "--out", merged, "--json"]
    assert main([str(word) for word in words]) == 0
    config = AutoModelForCausalLM.from_pretrained(merged).generation_config
    assert config.eos_token_id == [tokenizer.eos_token_id, turn]


def test_what_ends_an_answer_is_what_tokenizer_base_or_training_say(tmp_path: Path) -> None:
    model, tokenizer = lk.load_model(_base(tmp_path / "base", listed=True))
    end, turn = (tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<|end|>"))
    assert end_tokens(model, tokenizer) == [end, turn]
    assert end_tokens(model, tokenizer, trained=[5]) == [5, end, turn]
    (ends,) = ends_of_rows(model, tokenizer, 1)
    settings = generation_settings(tokenizer, ends, max_new_tokens=1)
    assert settings.eos_token_id == [end, turn]
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    assert end_tokens(model, tokenizer) == [end]
    ids = tokenizer("ab</s>cd").input_ids
    assert text_of(tokenizer, ids, {end}) == "ab"


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("prompt", PromptRow(prompt="a", completion="b</s>")),
        ("text", TextRow(text="a\nb</s>")),
    ],
)
def test_an_end_token_that_the_text_has_is_not_added_twice(kind: RowType, row: Any) -> None:
    tokenizer = build_tokenizer()
    encoded = encode_rows(Rows(kind=kind, rows=(row,), source="rows"), tokenizer, DataConfig())
    assert tokenizer.decode(encoded[0].input_ids) == "a\nb</s>"
    assert encoded.ends == (tokenizer.eos_token_id,)


def test_a_start_token_that_the_text_has_is_not_added_twice() -> None:
    tokenizer = build_tokenizer(starts=True)
    rows = Rows(kind="prompt", rows=(PromptRow(prompt="<s>a", completion="b"),), source="rows")
    encoded = encode_rows(rows, tokenizer, DataConfig())
    assert tokenizer.decode(encoded[0].input_ids) == "<s>a\nb</s>"
    plain = encode_rows(
        Rows(kind="prompt", rows=(PromptRow(prompt="<s><s>a", completion="b"),), source="rows"),
        build_tokenizer(),
        DataConfig(),
    )
    assert build_tokenizer().decode(plain[0].input_ids).startswith("<s><s>a")
