"""Sweeps: every member trains exactly as if it were alone, whatever happens to the others."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import build_tokenizer

import lorakit as lk
import lorakit.train.prepare as preparation
import lorakit.train.run as training
import lorakit.train.sweep as sweeping
from lorakit.adapter import Adapter
from lorakit.attach import adapter_parameters
from lorakit.config import DataConfig, LoRAConfig, TrainConfig
from lorakit.errors import ConfigError, OutputError, TrainingError
from lorakit.models.load import redraw_fresh_head
from lorakit.tasks.batches import training_batch
from lorakit.tasks.encode import Example
from lorakit.train.collate import Collator
from lorakit.train.joint import MicroBatch, joint_losses
from lorakit.train.loss import Loss
from lorakit.train.members import members_of
from lorakit.train.run import train
from lorakit.train.strand import Strand
from lorakit.train.sweep import sweep
from lorakit.train.sweep_plot import Point, draw, lines_of

ADAPTERS = {
    "small": LoRAConfig(rank=1, targets=("q", "v")),
    "large": LoRAConfig(rank=8, alpha=32, targets=("all-linear",)),
    "odd": LoRAConfig(rank=3, targets=("k", "mlp"), layers="1"),
}


def examples(name, *, classes=0):
    """Return rows whose number and lengths differ between the adapters."""
    draw = torch.Generator().manual_seed(len(name) + ord(name[0]))
    rows = []
    for row in range({"small": 1, "large": 4, "odd": 2}[name]):
        length = 4 + (row * 5 + len(name)) % 9
        ids = torch.randint(3, 16, (length,), generator=draw).tolist()
        prompt = 1 + row % (length - 2)
        labels = row % classes if classes else [-100] * prompt + ids[prompt:]
        rows.append(Example(input_ids=ids, labels=labels))
    return rows


def gradients(model, name):
    found = {n: p.grad for n, p in adapter_parameters(model, name)}
    assert all(gradient is not None for gradient in found.values())
    return found


def alone(model, batch):
    """Return loss and gradients of one adapter by itself, as plain torch computes them."""
    model.zero_grad()
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    with lk.route(model, batch.name):
        loss = batch.loss(model(**inputs), batch.inputs["labels"], num_items_in_batch=batch.items)
        loss.backward()
    return loss.detach(), gradients(model, batch.name)


def check_gradients(model, batches, *, rtol, atol):
    expected = {batch.name: alone(model, batch) for batch in batches}
    model.zero_grad()
    losses = joint_losses(model, batches, pad_id=0)
    for batch, loss in zip(batches, losses, strict=True):
        torch.testing.assert_close(loss, expected[batch.name][0], rtol=rtol, atol=atol)
        found = gradients(model, batch.name)
        for name, gradient in expected[batch.name][1].items():
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=name)


def with_adapters(model, **changes):
    for number, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        lk.attach(model, config.model_copy(update=changes), name=name)
        # With B at zero A would have no gradient.
        for path, parameter in adapter_parameters(model, name):
            if path.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.05)
    return model


TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-5)}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("trims", [True, False])
def test_gradients_of_language_models_equal_those_alone(tiny_llama, dtype, trims):
    model, tokenizer = lk.load_model(str(tiny_llama))
    with_adapters(model).to(dtype)
    collate = Collator(tokenizer, model, task="generation" if trims else "other")
    loss = Loss("generation", label_smoothing=0.1)
    batches = [
        MicroBatch(name=name, inputs=collate(examples(name)), loss=loss, items=7 + number)
        for number, name in enumerate(ADAPTERS)
    ]
    assert ("logits_to_keep" in batches[0].inputs) == trims
    rtol, atol = TOLERANCE[dtype]
    check_gradients(model, batches, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_gradients_of_classifiers_with_own_heads_equal_those_alone(family, dtype):
    head = "ForSequenceClassification"
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = with_adapters(build(family, head=head, num_labels=3, **off), bias="lora").to(dtype)
    loss = Loss("classification")
    batches = [
        MicroBatch(
            name=name,
            inputs=training_batch(examples(name, classes=3), pad_id=0),
            loss=loss,
            items=None,
        )
        for name in ADAPTERS
    ]
    assert any("classifier" in n or "score" in n for n, _ in adapter_parameters(model, "odd"))
    rtol, atol = TOLERANCE[dtype]
    check_gradients(model, batches, rtol=rtol, atol=atol)


def test_nan_in_one_adapter_leaves_the_others_bits_alone(tiny_llama):
    model, tokenizer = lk.load_model(str(tiny_llama))
    with_adapters(model)
    collate = Collator(tokenizer, model, task="generation")
    batches = [
        MicroBatch(name=name, inputs=collate(examples(name)), loss=Loss("generation"), items=9)
        for name in ADAPTERS
    ]
    before = joint_losses(model, batches, pad_id=0)
    kept = {name: {n: g.clone() for n, g in gradients(model, name).items()} for name in ADAPTERS}
    model.zero_grad()
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "large"):
            parameter.fill_(math.nan)
    after = joint_losses(model, batches, pad_id=0)
    assert after[1].isnan()
    for number, name in ((0, "small"), (2, "odd")):
        assert torch.equal(before[number], after[number])
        for path, gradient in gradients(model, name).items():
            assert torch.equal(gradient, kept[name][path]), path


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "gpt2"])
def test_a_redrawn_head_is_that_of_another_load(family, tmp_path):
    build(family, head="Model").save_pretrained(tmp_path)
    build_tokenizer(pad_token="<s>").save_pretrained(tmp_path)
    torch.manual_seed(1)
    model, _ = lk.load_model(tmp_path, task="classification", labels=("a", "b", "c"))
    torch.manual_seed(2)
    other, _ = lk.load_model(tmp_path, task="classification", labels=("a", "b", "c"))
    torch.manual_seed(2)
    redraw_fresh_head(model)
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# --- whole sweeps


@pytest.fixture
def settings(tiny_llama, prompt_rows, tmp_path):
    """Return a maker of settings for a short sweep."""

    def make(sweep=None, **changes):
        values = {
            "model": str(tiny_llama),
            "out": tmp_path / "sweep",
            "lora": LoRAConfig(rank=4, targets=("all-linear",)),
            "data": DataConfig(train=str(prompt_rows), validation=str(prompt_rows)),
            "dtype": "float32",
            "steps": 8,
            "eval_every": 4,
            "save_every": 3,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "sweep": sweep,
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def in_float64(monkeypatch):
    """Train in float64, where Adam cannot make a visible step of the noise of a tiny gradient."""

    prepare_all = preparation.prepare_all

    def prepare_in_float64(configs):
        prepared = prepare_all(configs)
        for each in prepared.values():
            each.model.double()
        return prepared

    monkeypatch.setattr(preparation, "prepare_all", prepare_in_float64)
    monkeypatch.setattr(sweeping, "prepare_all", prepare_in_float64)


def assert_same_adapter(found, expected, *, tolerance):
    found, expected = Adapter.load(found), Adapter.load(expected)
    assert found.card.keys() == expected.card.keys()
    assert {k: v for k, v in found.card.items() if k != "scores"} == {
        k: v for k, v in expected.card.items() if k != "scores"
    }
    assert found.card["scores"] == pytest.approx(expected.card["scores"], rel=1e-3)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(
            found.tensors[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_members_equal_separate_runs(config, tmp_path, *, tolerance):
    result = sweep(config)
    assert [each.status for each in result.members] == ["finished"] * len(result.members)
    for each in result.members:
        own = each.member.config
        separate = train(own.model_copy(update={"out": tmp_path / "alone" / each.name}))
        assert each.trained.steps == separate.steps
        assert each.trained.best_step == separate.best_step
        assert each.trained.parameters == separate.parameters
        assert each.trained.first_loss == pytest.approx(separate.first_loss, rel=1e-5)
        assert each.trained.last_loss == pytest.approx(separate.last_loss, rel=1e-3)
        for folder in ("", "last"):
            assert_same_adapter(own.out / folder, separate.out / folder, tolerance=tolerance)
        checkpoints = [sorted(p.name for p in (o / "checkpoints").iterdir()) for o in
                       (own.out, separate.out)]
        assert checkpoints[0] == checkpoints[1]
    return result


def test_members_equal_separate_runs(settings, tmp_path, in_float64):
    members = [
        {"lora.rank": 1, "name": "one"},
        {"lora.rank": 8, "lora.alpha": 32, "seed": 1, "batch_size": 3, "learning_rate": 2e-3},
        {"lora.targets": "q,v", "steps": 13, "schedule": "cosine", "weight_decay": 0.1},
        {"lora.layers": "1", "seed": 2, "max_grad_norm": 0.05, "label_smoothing": 0.1},
        {"data.train_rows": 11, "steps": 5, "data.max_length": 6, "eval_every": 2},
        {"accumulate": 3, "batch_size": 2, "warmup_steps": 0},
    ]
    assert_members_equal_separate_runs(settings(members), tmp_path, tolerance=1e-6)


def test_members_equal_separate_runs_in_float32(settings, tmp_path):
    config = settings({"lora.rank": [1, 4], "seed": [0, 1]}, learning_rate=1e-3)
    assert_members_equal_separate_runs(config, tmp_path, tolerance=1e-5)


def test_members_with_heads_and_biases_equal_separate_runs(
    settings, tmp_path, label_rows, tiny_bert_without_dropout, in_float64
):
    config = settings(
        [{"seed": 0}, {"seed": 1, "lora.bias": "lora"}, {"seed": 2, "lora.rank": 1}],
        model=str(tiny_bert_without_dropout),
        data=DataConfig(train=str(label_rows), validation=str(label_rows)),
        weight_decay=0.1,
        steps=12,
    )
    result = assert_members_equal_separate_runs(config, tmp_path, tolerance=1e-6)
    assert result.metric == "accuracy"
    heads = [Adapter.load(each.member.config.out).tensors["classifier.weight"] for each in
             result.members]
    assert not torch.equal(heads[0], heads[1])


@pytest.fixture
def tiny_bert_without_dropout(tiny_bert, tmp_path):
    """Return a tiny encoder whose runs do not depend on the random numbers of dropout."""
    folder = tmp_path / "no-dropout"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_gradient_checkpointing_changes_nothing(settings, tmp_path, in_float64):
    config = settings({"lora.rank": [1, 4]}, gradient_checkpointing=True, steps=5, eval_every=5)
    assert_members_equal_separate_runs(config, tmp_path, tolerance=1e-6)
