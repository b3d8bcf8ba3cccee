"""Preferences: each form of the loss beside its formula, and what rows of two answers become."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.config.train import DataConfig, PreferenceSettings
from lorakit.data.batches import preference_batch
from lorakit.data.chat import IGNORED
from lorakit.data.encode import encode_rows
from lorakit.data.objectives.preference import TARGETS
from lorakit.data.rows import read_rows
from lorakit.errors import DataError
from lorakit.training.loss import Loss
from references import attach_random
from tiny_models import build
from tiny_tokenizers import build_tokenizer

ROWS = [
    {"prompt": "red cat", "chosen": "big", "rejected": "old dog bird"},
    {"prompt": "new", "chosen": "fish red red", "rejected": "cat"},
]


@pytest.fixture
def encoded(tiny_llama, tmp_path):
    """A function that encodes rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return lambda rows=ROWS: _encoded(tokenizer, tmp_path, rows)


def written(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _encoded(tokenizer, folder, rows):
    read = read_rows(written(folder, rows), DataConfig())
    assert read.task == "preference"
    return encode_rows(read, tokenizer, DataConfig())


def test_a_row_is_two_samples_of_one_prompt(encoded):
    found = encoded()
    first = found.examples[0]
    prompt = [label == IGNORED for label in first.labels].index(False)
    assert first.input_ids[:prompt] == first.rejected.input_ids[:prompt]
    assert len(first.rejected.input_ids) == len(first.input_ids) + 2
    batch = preference_batch(found.examples, pad_id=0)
    assert batch["input_ids"].shape[0] == 4
    assert batch[TARGETS].sum(1).tolist() == [2, 4, 4, 2]


def test_rows_that_compare_nothing_are_named(encoded):
    rows = [{**ROWS[0], "rejected": "big"}, {**ROWS[1], "chosen": None}]
    with pytest.raises(DataError) as caught:
        encoded(rows)
    assert "line 1: chosen and rejected are the same" in str(caught.value)
    assert "line 2" in str(caught.value)


def log_probability(model, example):
    """log π of the target tokens of one sample alone, in float64, and their number."""
    ids = torch.tensor([example.input_ids])
    scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    wanted = [(at, token) for at, token in enumerate(example.labels[1:]) if token != IGNORED]
    return float(sum(scores[at, token] for at, token in wanted)), len(wanted)


def log_odds(mean):
    """log(p/(1 − p)) of the probability whose logarithm is `mean`."""
    return mean - math.log(1 - math.exp(mean))


FORMULAS = {
    "orpo": lambda c, r, c0, r0, n, m: (
        0.3 * math.log1p(math.exp(log_odds(r / m) - log_odds(c / n)))
    ),
    "dpo": lambda c, r, c0, r0, n, m: math.log1p(math.exp(-0.3 * (c - r - c0 + r0))),
    "ipo": lambda c, r, c0, r0, n, m: ((c - c0) / n - (r - r0) / m - 1 / 0.6) ** 2,
    "cpo": lambda c, r, c0, r0, n, m: math.log1p(math.exp(-0.3 * (c - r))),
    "simpo": lambda c, r, c0, r0, n, m: math.log1p(math.exp(0.5 - 0.3 * (c / n - r / m))),
}


@pytest.mark.parametrize("form", FORMULAS)
@torch.no_grad()
def test_a_loss_is_its_formula(form, encoded):
    model = build("llama")
    attach_random(model, rank=2, targets=("q", "down"))
    examples = encoded().examples
    batch = preference_batch(examples, pad_id=0)
    labels = batch.pop("labels")
    loss = Loss("preference", preference=PreferenceSettings(form=form, beta=0.3, nll=0.7))
    found = loss(loss.objective.outputs(model, batch), labels)
    expected, usual, tokens = 0.0, 0.0, 0
    for each in examples:
        (c, n), (r, m) = (log_probability(model, one) for one in (each, each.rejected))
        with lk.route(model, None):
            (c0, _), (r0, _) = (log_probability(model, one) for one in (each, each.rejected))
        expected += FORMULAS[form](c, r, c0, r0, n, m) / len(examples)
        # The usual loss is of the answer alone for cpo, and of the prompt too for orpo.
        whole = replace(each, labels=each.input_ids)
        c, n = log_probability(model, whole) if form == "orpo" else (c, n)
        usual, tokens = usual + c, tokens + n
    expected -= 0.7 * usual / tokens if form in ("cpo", "orpo") else 0.0
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_an_answer_that_is_certain_has_finite_odds_and_gradients():
    objective = Loss("preference", preference=PreferenceSettings(form="orpo")).objective
    sure = torch.tensor([[0.0, -3.0, 2.0, 2.0, 0.0, 0.0, -1.0, 4.0]], requires_grad=True)
    loss = objective.loss(sure, torch.zeros(1))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25, abs=1e-4)
    assert sure.grad.isfinite().all()


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [turn("system", "be brief"), turn("user", "red cat")]
BETTER, WORSE = turn("assistant", "big"), turn("assistant", "old dog")
LAYOUTS = {
    "three lists": {"prompt": ASKED, "chosen": [BETTER], "rejected": [WORSE]},
    "whole conversations": {"chosen": [*ASKED, BETTER], "rejected": [*ASKED, WORSE]},
    "answers as texts": {"prompt": ASKED, "chosen": "big", "rejected": "old dog"},
    "the prompt twice": {"prompt": ASKED, "chosen": [*ASKED, BETTER], "rejected": [*ASKED, WORSE]},
    "and as a text": {"prompt": "red cat", "chosen": [*ASKED, BETTER], "rejected": [*ASKED, WORSE]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conversation_is_written_by_the_chat_template(layout, tmp_path):
    tokenizer = build_tokenizer()
    (example,) = _encoded(tokenizer, tmp_path, [LAYOUTS[layout]]).examples
    asked = "<|system|>be brief<|end|>\n<|user|>red cat<|end|>\n<|assistant|>"
    for found, answer in ((example, "big"), (example.rejected, "old dog")):
        assert tokenizer.decode(found.input_ids).rstrip() == f"{asked}{answer}<|end|>"
        targets = [label for label in found.labels if label != IGNORED]
        assert tokenizer.decode(targets) == f"{answer}<|end|>"


def test_a_text_beside_answers_alone_is_the_user_s_message(tmp_path):
    row = {"prompt": "red cat", "chosen": [BETTER], "rejected": [WORSE]}
    (read,) = read_rows(written(tmp_path, [row]), DataConfig(), task="preference").rows
    assert read.texts == {"prompt": [turn("user", "red cat")], "rejected": [WORSE]}
    assert read.reference == [BETTER]


ANOTHER = [turn("user", "blue fish")]
RUBBISH = {
    "there is no prompt, which only answers": {"chosen": "big", "rejected": "old"},
    "there is no prompt: both answers": {"chosen": [BETTER], "rejected": [WORSE]},
    "the same, so neither": {"chosen": [*ASKED, BETTER], "rejected": [*ASKED, BETTER]},
    "the last message of chosen is the user's": {"chosen": ASKED, "rejected": [*ASKED, WORSE]},
    "there is no rejected": {"chosen": [*ASKED, BETTER]},
    "no prompt in common: from the start chosen has a message of the system": {
        "chosen": [*ASKED, BETTER],
        "rejected": [*ANOTHER, WORSE],
    },
    "no prompt in common: after 1 messages chosen has a message of the user": {
        "chosen": [*ASKED, BETTER],
        "rejected": [ASKED[0], *ANOTHER, WORSE],
    },
    "chosen has nothing after the 3 messages": {
        "chosen": [*ASKED, BETTER],
        "rejected": [*ASKED, BETTER, *ANOTHER, WORSE],
    },
    "'blue fish' is none of the messages": {
        "prompt": "blue fish",
        "chosen": [*ASKED, BETTER],
        "rejected": [*ASKED, WORSE],
    },
    "message 1 must have role and content": {"chosen": [{"say": "big"}], "rejected": [WORSE]},
    "its answers are texts, and those of the first row lists": ROWS[0],
}


def test_conversations_that_compare_nothing_are_named(tmp_path):
    rows = [LAYOUTS["three lists"], *({"rejected": None} | row for row in RUBBISH.values())]
    *others, mixed = RUBBISH
    with pytest.raises(DataError) as caught:
        read_rows(written(tmp_path, rows[:-1]), DataConfig())
    for number, words in enumerate(others, start=2):
        (line,) = [each for each in str(caught.value).splitlines() if f"line {number}:" in each]
        assert words in line
    with pytest.raises(DataError, match=f"line 2: {mixed}"):
        read_rows(written(tmp_path, [rows[0], rows[-1]]), DataConfig())
