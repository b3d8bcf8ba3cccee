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

import lorakit as lk
import lorakit.train.prepare as preparation
import lorakit.train.run as training
import lorakit.train.sweep as sweeping
from lorakit.adapter import Adapter
from lorakit.attach import adapter_parameters
from lorakit.cli.main import main
from lorakit.config import DataConfig, LoRAConfig, TrainConfig
from lorakit.errors import ConfigError, OutputError, TrainingError
from lorakit.models.load import redraw_fresh_head
from lorakit.tasks.batches import training_batch
from lorakit.tasks.encode import Example
from lorakit.train import sweep_plot
from lorakit.train.collate import Collator
from lorakit.train.joint import MicroBatch, joint_losses
from lorakit.train.loss import Loss
from lorakit.train.members import members_of
from lorakit.train.run import train
from lorakit.train.strand import Strand
from lorakit.train.sweep import sweep
from lorakit.train.sweep_plot import Point, draw, lines_of
from tiny_models import build
from tiny_tokenizers import build_tokenizer

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
        checkpoints = [
            sorted(p.name for p in (o / "checkpoints").iterdir()) for o in (own.out, separate.out)
        ]
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
    heads = [
        Adapter.load(each.member.config.out).tensors["classifier.weight"] for each in result.members
    ]
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


def test_one_loss_pass_serves_all_members_and_shrinks_as_they_end(settings, monkeypatch):
    rows = []

    def count(model, batches, *, pad_id):
        rows.append([batch.name for batch in batches])
        return joint_losses(model, batches, pad_id=pad_id)

    monkeypatch.setattr(sweeping, "joint_losses", count)
    sweep(settings([{"steps": 3, "name": "short"}, {"steps": 5, "name": "long"}]))
    assert rows == [["short", "long"]] * 3 + [["long"]] * 2


def test_patience_ends_one_member_alone(settings, monkeypatch):
    coming = {1: iter([3.0, 1.0, 2.0, 2.0, 2.0]), 4: iter([9.0, 8.0, 7.0, 6.0, 5.0])}

    def decide(model, *args, **kwargs):
        rank = lk.extract(model).config.rank
        return {"loss": next(coming[rank])}

    monkeypatch.setattr(training, "score", decide)
    result = sweep(settings({"lora.rank": [1, 4]}, steps=20, eval_every=4, patience=1))
    early, late = (each.trained for each in result.members)
    assert (early.steps, early.best_step) == (12, 8)
    assert (late.steps, late.best_step) == (20, 20)


def test_the_base_is_unchanged_and_scored_under_each_members_own_adapter(settings, tiny_llama):
    result = sweep(settings({"lora.rank": [1, 8]}, learning_rate=0.05, steps=12))
    losses = []
    for each in result.members:
        model, _ = lk.load_model(str(tiny_llama))
        adapter = Adapter.load(each.member.config.out)
        lk.attach(model, adapter)
        losses.append(adapter.card["scores"]["loss"])
        assert each.trained.scores["loss"] == losses[-1]
    assert losses[0] != losses[1]


def test_nan_stops_one_member_and_the_others_equal_separate_runs(settings, tmp_path, in_float64):
    wild = {"learning_rate": 1e30, "max_grad_norm": 1e30, "name": "wild"}
    result = sweep(settings([{"seed": 1, "name": "first"}, wild, {"lora.rank": 1, "name": "last"}]))
    assert [each.status for each in result.members] == ["finished", "stopped", "finished"]
    stopped = result.members[1]
    assert "the loss became" in str(stopped.error)
    kept = Adapter.load(stopped.member.config.out / "last")
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert "wild was stopped: the loss became" in (result.out / "sweep.md").read_text()
    for each in (result.members[0], result.members[2]):
        own = each.member.config
        separate = train(own.model_copy(update={"out": tmp_path / "alone" / each.name}))
        assert_same_adapter(own.out, separate.out, tolerance=1e-6)


def test_a_sweep_without_a_finished_member_is_an_error(settings):
    config = settings({"seed": [0, 1]}, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(TrainingError, match="no member of the sweep came to its end") as raised:
        sweep(config)
    assert str(raised.value).count("the loss became") == 2


def test_a_defect_in_one_member_is_raised_after_the_others_are_written(settings, monkeypatch):
    def fail(model, *args, **kwargs):
        if lk.extract(model).config.rank == 1:
            raise ZeroDivisionError("a defect")
        return {"loss": 1.0}

    monkeypatch.setattr(training, "score", fail)
    config = settings({"lora.rank": [1, 4]})
    with pytest.raises(ZeroDivisionError, match="a defect"):
        sweep(config)
    figures = json.loads((config.out / "sweep.json").read_text())
    assert [each["status"] for each in figures["members"]] == ["stopped", "finished"]


def run_in_process(config, tmp_path):
    """Start `lorakit train` as a program of its own."""
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "lorakit.cli", "train", str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(config, step, process):
    """Wait until the last member has a checkpoint of this step or a later one."""
    folder = members_of(config)[-1].config.out / "checkpoints"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(int(p.name.split("-")[1]) >= step for p in folder.glob("checkpoint-*")):
            return
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[1][-2000:]}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_an_ended_sweep_resumes_to_the_same_adapters(settings, tmp_path, how):
    varied = [{"lora.rank": 1, "steps": 4}, {"lora.rank": 4, "seed": 1}, {"lora.rank": 8}]
    changes = {"steps": 40, "learning_rate": 1e-3, "eval_every": 20}
    whole = sweep(settings(varied, **changes, out=tmp_path / "whole"))
    config = settings(varied, **changes, out=tmp_path / "ended")
    process = run_in_process(config, tmp_path)
    wait_for_step(config, 6, process)
    process.send_signal(how)
    _, messages = process.communicate()
    if how == signal.SIGINT:
        assert process.returncode == 130, messages[-2000:]
        assert "2 of 3 members are unfinished" in messages
        assert "--resume" in messages
        recorded = json.loads((config.out / "sweep.json").read_text())["members"]
        assert [each["status"] for each in recorded] == ["finished", "unfinished", "unfinished"]
    resumed = sweep(config.model_copy(update={"resume": True}))
    for found, expected in zip(resumed.members, whole.members, strict=True):
        assert found.trained.steps == expected.trained.steps
        assert found.trained.best_step == expected.trained.best_step
        assert found.trained.scores == pytest.approx(expected.trained.scores, rel=1e-4)
        for folder in ("", "last"):
            paths = (each.member.config.out / folder for each in (found, expected))
            assert_same_adapter(*paths, tolerance=1e-4)


def test_a_finished_member_is_not_trained_again(settings):
    config = settings({"lora.rank": [1, 4]})
    sweep(config)
    file = config.out / "rank=1" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    more = settings({"lora.rank": [1, 4, 8]}, resume=True)
    result = sweep(more)
    assert [each.status for each in result.members] == ["finished"] * 3
    assert file.stat().st_mtime_ns == before


def test_a_finished_run_that_is_resumed_does_not_train_on(settings):
    config = settings(steps=5)
    first = train(config)
    again = train(config.model_copy(update={"resume": True}))
    assert again.steps == 5
    assert_same_adapter(again.out / "last", first.out, tolerance=0)


# --- settings


def test_a_mapping_makes_all_combinations_and_a_list_its_members(tmp_path):
    grid = TrainConfig(out=tmp_path, sweep={"lora.rank": [1, 2], "seed": [0, 1]})
    names = ["rank=1,seed=0", "rank=1,seed=1", "rank=2,seed=0", "rank=2,seed=1"]
    assert [member.name for member in members_of(grid)] == names
    listed = TrainConfig(
        out=tmp_path,
        lora=LoRAConfig(alpha=4, targets=("k",)),
        sweep=[{"lora.rank": 2}, {"lora.targets": "q, v", "data.train": "x/a.csv", "name": "b"}],
    )
    first, second = members_of(listed)
    assert first.name == "rank=2,targets=k,train=none"
    assert first.config.lora == LoRAConfig(rank=2, alpha=4, targets=("k",))
    assert (second.name, second.config.out) == ("b", tmp_path / "b")
    assert second.config.lora.targets == ("q", "v")
    assert second.config.data.train == "x/a.csv"
    assert second.settings == {"lora.rank": 8, "lora.targets": ["q", "v"], "data.train": "x/a.csv"}


MISTAKES = [
    ({}, ["it is empty"]),
    (
        {"model": ["a"], "ranc": [1], "rank": [2], "lora": [3], "seed": 3},
        [
            "(5 problems)",
            "model: cannot vary",
            "ranc: unknown setting; did you mean 'lora.rank'?",
            "rank: unknown setting; did you mean 'lora.rank'?",
            "lora: is a section: name its settings, such as lora.rank",
            "seed: must be a list of values to try, found 3",
        ],
    ),
    (
        {"lora.rank": [0, 2], "learning_rate": ["x", 1e-3]},
        ["(2 problems)", "lora.rank: input should be greater", "learning_rate: input should be a"],
    ),
    ({"lora.rank": [1, 1]}, ["rank=1: has the settings of rank=1"]),
    ([{"seed": 1}, 3], ["member 2: must be a mapping of settings, not 3"]),
    ([{"seed": 1, "name": "a/b"}], ["name: 'a/b' is not fit for a folder"]),
    ([{"seed": 1, "name": "a"}, {"name": "A"}], ["A: two members have this name"]),
]


@pytest.mark.parametrize(("asked", "texts"), MISTAKES)
def test_wrong_sweeps_are_told_in_one_message(tmp_path, asked, texts):
    with pytest.raises(ConfigError) as raised:
        members_of(TrainConfig(out=tmp_path, sweep=asked))
    for text in texts:
        assert text in str(raised.value)


def test_mistakes_are_told_before_anything_is_written(settings, tmp_path, label_rows, prompt_rows):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    ranks = {"lora.rank": [1, 2]}
    with pytest.raises(OutputError, match="exists and is not empty"):
        sweep(settings(ranks, out=occupied))
    with pytest.raises(TrainingError, match="no member to resume"):
        sweep(settings(ranks, resume=True))
    with pytest.raises(ConfigError, match=r"steps=2: warmup_steps 2 leaves nothing") as raised:
        sweep(settings({"steps": [1, 2, 9]}))
    assert "(2 problems)" in str(raised.value)
    with pytest.raises(lk.LorakitError, match=r"targets=qq: .*qq"):
        sweep(settings({"lora.targets": ["q", "qq"]}))
    with pytest.raises(ConfigError, match=r"classification into no, yes"):
        sweep(settings({"data.train": [str(label_rows), str(prompt_rows)]}, data=DataConfig()))
    with pytest.raises(ConfigError, match=r"lorakit\.train\.sweep"):
        train(settings(ranks))
    assert os.listdir(occupied) == ["mine.txt"]
    assert not (tmp_path / "sweep").exists()


# --- the command line, the record and the plot


def lorakit_train(capsys, *words):
    code = main(["train", *words])
    return code, capsys.readouterr()


def test_the_command_line_takes_a_mapping_or_a_list(settings, tmp_path, capsys):
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(settings().model_dump(mode="json")))
    code, printed = lorakit_train(capsys, str(file), "--sweep", "lora.rank: [1, 2]")
    assert code == 0, printed.err
    assert "2 adapters on " in printed.out
    assert "rank=2" in printed.out
    assert "rank=1: 928 parameters" in printed.err or "rank=1: " in printed.err
    words = ["--sweep", "[{seed: 3}, {seed: 4, name: other}]", "--out", str(tmp_path / "dry")]
    code, printed = lorakit_train(capsys, str(file), *words, "--dry-run")
    assert code == 0, printed.err
    assert printed.out.count("parameters are trained") == 2
    assert "other\nmodule" in printed.out
    assert not (tmp_path / "dry").exists()
    code, printed = lorakit_train(capsys, str(file), "--sweep", "3")
    assert code == 2
    assert "sweep" in printed.err


def test_a_sweep_leaves_figures_a_table_and_a_plot(settings):
    result = sweep(settings({"lora.rank": [1, 4]}))
    figures = json.loads((result.out / "sweep.json").read_text())
    assert figures["score"] == "validation loss"
    for each, trained in zip(figures["members"], result.finished.values(), strict=True):
        folder = result.out / each["name"]
        adapter = Adapter.load(folder)
        assert each["result"]["parameters"] == sum(t.numel() for t in adapter.tensors.values())
        assert each["adapter_bytes"] == (folder / "adapter_model.safetensors").stat().st_size
        assert each["score"] == adapter.card["scores"]["loss"] == trained.scores["loss"]
        assert {"log.jsonl", "last", "checkpoints"} <= set(os.listdir(folder))
    table = (result.out / "sweep.md").read_text()
    assert "| member | rank | parameters |" in table
    assert f"{figures['members'][0]['score']:.4f}" in table
    assert (result.out / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_table_says_what_is_missing(settings, monkeypatch):
    monkeypatch.setattr(sweep_plot, "is_available", lambda: False)
    result = sweep(settings({"lora.rank": [1, 4]}, steps=4))
    assert "pip install 'lorakit[plots]'" in (result.out / "sweep.md").read_text()
    assert not (result.out / "sweep.png").exists()


def test_without_validation_members_are_compared_by_training_loss(settings, prompt_rows):
    config = settings({"seed": [0, 1]}, data=DataConfig(train=str(prompt_rows)))
    result = sweep(config)
    assert result.score_name == "training loss"
    assert "training loss" in result.summary


def point(parameters, score, **settings):
    return Point(settings=settings, parameters=parameters, score=score)


def test_the_plot_has_a_line_for_each_setting_but_the_rank():
    points = [
        point(rank * size, 0.5, **{"lora.rank": rank, "lora.targets": targets, "lora.alpha": rank})
        for targets, size in ((["q", "v"], 300), (["q"], 100))
        for rank in (8, 1)
    ]
    lines = lines_of(points)
    assert {name: [each.parameters for each in line] for name, line in lines.items()} == {
        "targets=q": [100, 800],
        "targets=q+v": [300, 2400],
    }


def test_a_plot_of_many_and_of_one_is_drawn_without_a_warning(tmp_path):
    many = [
        point(
            100 * rank + seed, rank / 9 + seed, **{"lora.rank": rank, "seed": seed, "x": "y" * 99}
        )
        for rank in (1, 2, 4, 8)
        for seed in range(5)
    ]
    for points in (many, many[:1]):
        draw(points, tmp_path / "plot.png", score_name="validation accuracy", title="title")
        assert (tmp_path / "plot.png").stat().st_size > 1000


# --- strands


def test_a_strand_has_its_own_random_numbers():
    def work(ask):
        torch.manual_seed(5)
        return [torch.rand(1).item() for _ in range(3) if ask("a turn") is None]

    strand = Strand("worker", work)
    torch.manual_seed(1)
    expected_outside = torch.rand(4)[1:].tolist()
    torch.manual_seed(1)
    torch.rand(1)
    outside = []
    while strand.advance() is not None:
        outside.append(torch.rand(1).item())
    torch.manual_seed(5)
    assert strand.made == torch.rand(3).tolist()
    assert outside == expected_outside


def test_a_strand_keeps_its_error_and_can_be_closed():
    def fail(ask):
        raise ValueError("no")

    failed = Strand("fails", fail)
    assert failed.advance() is None
    assert isinstance(failed.error, ValueError)
    endless = Strand("endless", lambda ask: [ask(n) for n in range(10**9)])
    assert endless.advance() == 0
    endless.close()
    assert isinstance(endless.error, SystemExit)
