"""Preferences: each form of the loss beside its formula, and what rows of two answers become."""

import json
import math

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

ROWS = [
    {"prompt": "red cat", "chosen": "big", "rejected": "old dog bird"},
    {"prompt": "new", "chosen": "fish red red", "rejected": "cat"},
]


@pytest.fixture
def encoded(tiny_llama, tmp_path):
    """A function that encodes rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    return lambda rows=ROWS: _encoded(tokenizer, tmp_path, rows)


def _encoded(tokenizer, folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(str(file), DataConfig())
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


FORMULAS = {
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
    expected, chosen, tokens = 0.0, 0.0, 0
    for each in examples:
        (c, n), (r, m) = (log_probability(model, one) for one in (each, each.rejected))
        with lk.route(model, None):
            (c0, _), (r0, _) = (log_probability(model, one) for one in (each, each.rejected))
        expected += FORMULAS[form](c, r, c0, r0, n, m) / len(examples)
        chosen, tokens = chosen + c, tokens + n
    expected -= 0.7 * chosen / tokens if form == "cpo" else 0.0
    assert float(found) == pytest.approx(expected, abs=1e-5)
