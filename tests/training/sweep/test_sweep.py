"""Sweeps: every trial trains exactly as if it were alone, whatever happens to the others."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

import lorakit as lk
import lorakit.training.prepare as preparation
import lorakit.training.run as training
import lorakit.training.sweep.sweep as sweeping
from lorakit.adapter.adapter import Adapter
from lorakit.cli.main import main
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import ConfigError, OutputError, TrainingError
from lorakit.training.run import train
from lorakit.training.sweep import plot as sweep_plot
from lorakit.training.sweep.joint_step import joint_losses
from lorakit.training.sweep.sweep import sweep

FIRST = ("red", "green", "blue", "small", "old", "new")


@pytest.fixture
def settings(tiny_llama, prompt_rows, tmp_path):
    """A maker of settings for a short sweep."""

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

    def prepare_in_float64(configs, *more, **given):
        prepared = prepare_all(configs, *more, **given)
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
            found.tensors[name], tensor, rtol=0, atol=tolerance, msg=f"{name}: ".__add__
        )


def assert_trials_equal_separate_runs(config, tmp_path, *, tolerance):
    result = sweep(config)
    assert [each.status for each in result.trials] == ["finished"] * len(result.trials)
    for each in result.trials:
        own = each.trial.config
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


@pytest.mark.thorough
def test_trials_equal_separate_runs(settings, tmp_path, in_float64):
    # Texts, unlike answers, have a label on their first token.
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{w} cat dog big"}) for w in FIRST))
    trials = [
        {"lora.rank": 1, "name": "one", "weight_decay": 0.1, "steps": 9, "schedule": "cosine"},
        {"lora.alpha": 32, "seed": 1, "batch_size": 3, "learning_rate": 2e-3, "z_loss": 0.1},
        {"lora.layers": "1", "seed": 2, "max_grad_norm": 0.05, "label_smoothing": 0.1, "steps": 5},
        {"accumulate": 3, "batch_size": 2, "data.train_rows": 11, "data.max_length": 6},
        {"data.train": str(texts), "data.validation": str(texts), "batch_size": 4, "steps": 4},
    ]
    assert_trials_equal_separate_runs(settings(trials), tmp_path, tolerance=1e-6)


@pytest.mark.thorough
def test_trials_equal_separate_runs_in_float32(settings, tmp_path):
    config = settings({"seed": [0, 1]}, learning_rate=1e-3, steps=6, eval_every=6)
    assert_trials_equal_separate_runs(config, tmp_path, tolerance=1e-5)


@pytest.mark.thorough
def test_trials_with_heads_and_biases_equal_separate_runs(
    settings, tmp_path, label_rows, tiny_bert_without_dropout, in_float64
):
    config = settings(
        [{"seed": 0}, {"seed": 1, "lora.bias": "lora", "lora.rank": 1, "z_loss": 0.1}],
        model=str(tiny_bert_without_dropout),
        data=DataConfig(train=str(label_rows), validation=str(label_rows)),
        weight_decay=0.1,
    )
    result = assert_trials_equal_separate_runs(config, tmp_path, tolerance=1e-6)
    assert result.metric == "accuracy"
    heads = [
        Adapter.load(each.trial.config.out).tensors["classifier.weight"] for each in result.trials
    ]
    assert not torch.equal(heads[0], heads[1])


@pytest.fixture
def tiny_bert_without_dropout(tiny_bert, tmp_path):
    """A tiny encoder whose runs do not depend on the random numbers of dropout."""
    folder = tmp_path / "no-dropout"
    folder.mkdir()
    for file in tiny_bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.thorough
def test_recomputation_changes_nothing(settings, tmp_path, in_float64):
    config = settings({"lora.rank": [1, 4]}, memory="low", steps=5, eval_every=5)
    assert_trials_equal_separate_runs(config, tmp_path, tolerance=1e-6)


@pytest.mark.thorough
def test_one_loss_pass_serves_all_trials_and_shrinks_as_they_end(settings, monkeypatch):
    rows = []

    def count(model, batches, *, pad_id):
        rows.append([batch.name for batch in batches])
        return joint_losses(model, batches, pad_id=pad_id)

    monkeypatch.setattr(sweeping, "joint_losses", count)
    sweep(settings([{"steps": 3, "name": "short"}, {"steps": 5, "name": "long"}]))
    assert rows == [["short", "long"]] * 3 + [["long"]] * 2


@pytest.mark.thorough
def test_patience_ends_one_trial_alone(settings, monkeypatch):
    coming = {1: iter([3.0, 1.0, 2.0, 2.0, 2.0]), 4: iter([9.0, 8.0, 7.0, 6.0, 5.0])}

    def decide(model, *args, **kwargs):
        rank = lk.extract(model).lora.rank
        return SimpleNamespace(scores={"loss": next(coming[rank])})

    monkeypatch.setattr(training, "scored", decide)
    result = sweep(settings({"lora.rank": [1, 4]}, steps=20, eval_every=4, patience=1))
    early, late = (each.trained for each in result.trials)
    assert (early.steps, early.best_step) == (12, 8)
    assert (late.steps, late.best_step) == (20, 20)


@pytest.mark.thorough
def test_the_base_is_unchanged_and_scored_under_each_trials_own_adapter(settings, tiny_llama):
    result = sweep(settings({"lora.rank": [1, 8]}, learning_rate=0.05, steps=12))
    losses = []
    for each in result.trials:
        model, _ = lk.load_model(str(tiny_llama))
        adapter = Adapter.load(each.trial.config.out)
        lk.attach(model, adapter)
        losses.append(adapter.card["scores"]["loss"])
        assert each.trained.scores["loss"] == losses[-1]
    assert losses[0] != losses[1]


@pytest.mark.thorough
def test_nan_stops_one_trial_and_the_others_equal_separate_runs(settings, tmp_path, in_float64):
    wild = {"learning_rate": 1e30, "max_grad_norm": 1e30, "name": "wild"}
    result = sweep(settings([wild, {"lora.rank": 1, "name": "last"}]))
    assert [each.status for each in result.trials] == ["stopped", "finished"]
    stopped, other = result.trials
    assert "the loss became" in str(stopped.error)
    kept = Adapter.load(stopped.trial.config.out / "last")
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())
    assert "wild was stopped: the loss became" in (result.out / "sweep.md").read_text()
    separate = train(other.trial.config.model_copy(update={"out": tmp_path / "alone"}))
    assert_same_adapter(other.trial.config.out, separate.out, tolerance=1e-6)


@pytest.mark.thorough
def test_a_sweep_without_a_finished_trial_is_an_error(settings):
    config = settings({"seed": [0, 1]}, learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(TrainingError, match="no trial of the sweep came to its end") as raised:
        sweep(config)
    assert str(raised.value).count("the loss became") == 2


@pytest.mark.thorough
def test_a_defect_in_one_trial_is_raised_after_the_others_are_written(settings, monkeypatch):
    def fail(model, *args, **kwargs):
        if lk.extract(model).lora.rank == 1:
            raise ZeroDivisionError("a defect")
        return SimpleNamespace(scores={"loss": 1.0})

    monkeypatch.setattr(training, "scored", fail)
    config = settings({"lora.rank": [1, 4]})
    with pytest.raises(ZeroDivisionError, match="a defect"):
        sweep(config)
    figures = json.loads((config.out / "sweep.json").read_text())
    assert [each["status"] for each in figures["members"]] == ["stopped", "finished"]


@pytest.fixture
def at_pass(monkeypatch):
    """A function that has something happen in one of a sweep's joint passes."""

    def arrange(number, happen):
        passes = iter(range(1, 1000))

        def disturbed(*args, **kwargs):
            if next(passes) == number:
                happen()
            return joint_losses(*args, **kwargs)

        monkeypatch.setattr(sweeping, "joint_losses", disturbed)

    return arrange


class PowerCut(BaseException):
    pass


def cut_power():
    raise PowerCut


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


ENDS = [(press_ctrl_c, KeyboardInterrupt, 0.0), (cut_power, PowerCut, 1e-4)]


@pytest.mark.parametrize(
    ("end", "error", "tolerance"),
    [pytest.param(*ENDS[0], id="ctrl-c", marks=pytest.mark.thorough), ENDS[1]],
)
@pytest.mark.thorough
def test_an_ended_sweep_resumes_to_the_same_adapters(
    settings, tmp_path, at_pass, end, error, tolerance
):
    trials = [{"steps": 3, "name": "short"}, {"seed": 1, "name": "first"}, {"seed": 2}]
    changes = {"steps": 8, "learning_rate": 1e-3, "eval_every": 4}
    whole = sweep(settings(trials, **changes, out=tmp_path / "whole"))
    config = settings(trials, **changes, out=tmp_path / "ended")
    at_pass(5, end)
    with pytest.raises(error) as raised:
        sweep(config)
    if error is KeyboardInterrupt:
        assert "2 of 3 trials are unfinished" in str(raised.value)
        assert "stopped after step 5 of 8, which is saved: give --resume" in str(raised.value)
    recorded = json.loads((config.out / "sweep.json").read_text())["members"]
    assert [each["status"] for each in recorded] == ["finished", "unfinished", "unfinished"]
    resumed = sweep(config.model_copy(update={"resume": True}))
    for found, expected in zip(resumed.trials, whole.trials, strict=True):
        assert found.trained.steps == expected.trained.steps
        assert found.trained.best_step == expected.trained.best_step
        assert found.trained.scores == pytest.approx(expected.trained.scores, rel=1e-4)
        for folder in ("", "last"):
            paths = (each.trial.config.out / folder for each in (found, expected))
            assert_same_adapter(*paths, tolerance=tolerance)


@pytest.mark.thorough
def test_a_sweep_that_fails_leaves_no_thread_behind(settings, at_pass):
    at_pass(2, cut_power)
    with pytest.raises(PowerCut):
        sweep(settings([{"name": "left"}, {"name": "right", "seed": 1}]))
    assert not {"left", "right"} & {thread.name for thread in threading.enumerate()}


@pytest.mark.thorough
def test_a_finished_trial_is_not_trained_again(settings):
    config = settings({"lora.rank": [1, 4]})
    sweep(config)
    file = config.out / "rank=1" / "last" / "adapter_model.safetensors"
    before = file.stat().st_mtime_ns
    more = settings({"lora.rank": [1, 4, 8]}, resume=True)
    result = sweep(more)
    assert [each.status for each in result.trials] == ["finished"] * 3
    assert file.stat().st_mtime_ns == before
    again = sweep(more)
    assert [each.trained for each in again.trials] == [each.trained for each in result.trials]


def test_a_finished_run_that_is_resumed_does_not_train_on(settings):
    config = settings(steps=5)
    first = train(config)
    again = train(config.model_copy(update={"resume": True}))
    assert again.steps == 5
    assert_same_adapter(again.out / "last", first.out, tolerance=0)


def test_mistakes_are_told_before_anything_is_written(settings, tmp_path, label_rows, prompt_rows):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").write_text("mine")
    ranks = {"lora.rank": [1, 2]}
    with pytest.raises(OutputError, match="exists and is not empty"):
        sweep(settings(ranks, out=occupied))
    with pytest.raises(TrainingError, match="no trial to resume"):
        sweep(settings(ranks, resume=True))
    with pytest.raises(ConfigError, match=r"steps=2: warmup_steps 2 leaves nothing") as raised:
        sweep(settings({"steps": [1, 2, 9]}))
    assert "(2 problems)" in str(raised.value)
    with pytest.raises(lk.LorakitError, match=r"targets=qq: .*qq"):
        sweep(settings({"lora.targets": ["q", "qq"]}))
    either = {"data.train": [str(label_rows), str(prompt_rows)]}
    with pytest.raises(ConfigError, match=r"classification into no, yes"):
        sweep(settings(either, data=DataConfig(), eval_every=None))
    with pytest.raises(ConfigError, match=r"call lk\.sweep"):
        train(settings(ranks))
    assert os.listdir(occupied) == ["mine.txt"]
    assert not (tmp_path / "sweep").exists()


def lorakit_train(capsys, *words):
    code = main(["train", *words])
    return code, capsys.readouterr()


@pytest.mark.thorough
def test_the_command_line_takes_a_mapping_or_a_list(settings, tmp_path, capsys):
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(settings().model_dump(mode="json")))
    code, printed = lorakit_train(capsys, str(file), "--sweep", "lora.rank: [1, 2]")
    assert code == 0, printed.err
    assert "2 adapters on " in printed.out
    assert "rank=2" in printed.out
    assert "rank=1: " in printed.err
    words = ["--sweep", "[{seed: 3}, {seed: 4, name: other}]", "--out", str(tmp_path / "dry")]
    code, printed = lorakit_train(capsys, str(file), *words, "--dry-run")
    assert code == 0, printed.err
    assert printed.out.count("parameters are trained") == 2
    assert "other\nrole" in printed.out
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
    assert "| trial  | rank | parameters |" in table
    assert f"{figures['members'][0]['score']:.4f}" in table
    assert (result.out / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_without_matplotlib_the_table_says_what_is_missing(settings, monkeypatch):
    monkeypatch.setattr(sweep_plot, "is_available", lambda: False)
    result = sweep(settings({"lora.rank": [1, 4]}, steps=4))
    assert "pip install 'lorakit[plots]'" in (result.out / "sweep.md").read_text()
    assert not (result.out / "sweep.png").exists()


@pytest.mark.thorough
def test_without_validation_trials_are_compared_by_training_loss(settings, prompt_rows):
    config = settings({"seed": [0, 1]}, data=DataConfig(train=str(prompt_rows)), eval_every=None)
    result = sweep(config)
    assert result.score_name == "training loss"
    assert "training loss" in result.summary
