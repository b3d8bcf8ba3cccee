"""Rows and answers that are longer than the model's context."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig

import lorakit as lk
from lorakit.answering.answer import fitted
from lorakit.cli.main import main
from lorakit.config.train import TrainConfig
from lorakit.models.shape import context_length
from lorakit.training.prepare import prepare
from lorakit.training.run import train
from tiny_models import build
from tiny_tokenizers import build_tokenizer

CONTEXT = 32
LENGTHS = (3, 20, 31, 40, 100)


@pytest.fixture(
    scope="module",
    params=["gpt2", *(pytest.param(each, marks=pytest.mark.thorough) for each in ("llama", "opt"))],
)
def base(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> Path:
    """A model with 32 positions, learnt or rotary, whose tokenizer knows no limit."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "long.jsonl"
    lines = ({"prompt": "red " * n, "completion": "cat dog"} for n in LENGTHS)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_rows_are_cut_to_the_context_and_counted(base: Path, rows: Path, tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(base),
        out=tmp_path / "out",
        data={"train": str(rows), "validation": str(rows), "max_length": 1000},
        dtype="float32",
        steps=2,
    )
    report = prepare(config).training.report
    assert (report.longest, report.max_length, report.truncated_prompts) == (CONTEXT, CONTEXT, 3)
    assert train(config).steps == 2


def test_answers_end_where_the_context_does(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--model", base, "--data.validation", rows, "--max-new-tokens", 20]
    assert main([str(word) for word in (*words, "--metrics", "exact_match", "--json")]) == 0
    remarks = json.loads(capsys.readouterr().out)["notes"]
    assert remarks == [
        "3 of 5 prompts have no room in the model's context of 32 tokens and were cut",
        "4 of 5 answers have less room than max_new_tokens 20 in the model's context of 32 tokens",
    ]
    prompt = "red " * 100
    words = ["generate", "--model", base, "--prompt", prompt, "--no-chat", "--max-new-tokens", 9]
    assert main([str(word) for word in words]) == 0
    assert "note: 1 of 1 prompts have no room" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("length", "asked", "kept", "room"),
    [(5, 20, 5, 20), (20, 20, 20, 12), (31, 20, 31, 1), (32, 20, 16, 16), (90, 4, 28, 4)],
)
def test_a_prompt_is_whole_while_it_leaves_any_room(
    length: int, asked: int, kept: int, room: int
) -> None:
    tokenizer = build_tokenizer()
    start = int(tokenizer.convert_tokens_to_ids("<s>"))
    prompt = [start, *range(2, length + 1)]
    fit = fitted(build("gpt2"), tokenizer, [prompt], max_new_tokens=asked)
    assert (len(fit.prompts[0]), fit.rooms) == (kept, [room])
    assert fit.prompts[0][0] == start
    assert fit.prompts[0][-1] == length
    assert len(fit.remarks) == (kept < length) + (room < asked)


def test_answers_do_not_depend_on_what_shares_their_batch(base: Path) -> None:
    model, tokenizer = lk.load_model(base)
    lines = ["red " * n for n in (3, 20, 28)]

    def ask(*asked: str) -> list[str]:
        settings = {"max_new_tokens": 6, "chat": False}
        return lk.generate(asked, model=model, tokenizer=tokenizer, **settings)

    with pytest.warns(UserWarning, match="1 of 3 answers have less room"):
        together = ask(*lines)
    assert together[:2] == [ask(line)[0] for line in lines[:2]]


@pytest.mark.parametrize(
    ("family", "length"),
    [("bert", 32), ("roberta", 31), ("xlm-roberta", 31), ("distilbert", 32)],
)
def test_the_context_is_what_the_positions_allow(family: str, length: int) -> None:
    model = build(family)
    assert context_length(model) == length
    ids = torch.full((1, length), 5)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    longer = torch.full((1, length + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=longer, attention_mask=torch.ones_like(longer))


def test_scaled_rotary_positions_reach_further() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    model = build("llama", rope_parameters={"rope_theta": 1e4, **scaling})
    assert isinstance(model.config, LlamaConfig)
    assert context_length(model) == 128
