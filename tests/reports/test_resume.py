"""A run that goes on from a checkpoint has the checkpoint's settings and rows, or is refused."""

import json
import shutil
from typing import Any

import pytest

import lorakit as lk
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import ConfigError, TrainingError
from lorakit.training.evaluation import Scored
from lorakit.training.run import train
from lorakit.training.sweep.sweep import sweep

NAMES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, prompt_rows, tmp_path_factory):
    """The settings of a finished run."""
    config = TrainConfig(
        model=str(tiny_llama),
        out=tmp_path_factory.mktemp("runs") / "whole",
        data=DataConfig(train=str(prompt_rows)),
        dtype="float32",
        steps=6,
        save_every=3,
        schedule="constant",
        warmup_steps=0,
        learning_rate=1e-2,
    )
    train(config)
    return config


@pytest.fixture
def interrupted(uninterrupted, tmp_path):
    """A maker of settings that resume a run which was stopped after three steps."""
    out = tmp_path / "cut"
    shutil.copytree(uninterrupted.out, out)
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")

    def settings(**changes):
        values = {**uninterrupted.model_dump(exclude_unset=True), "out": out, "resume": True}
        return TrainConfig(**{**values, **changes})

    return settings


def contents(folder):
    return [(folder / name).read_bytes() for name in NAMES]


def card(folder):
    return json.loads((folder / "lorakit.json").read_text(encoding="utf-8"))["card"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"learning_rate": 1e-5}, "learning_rate is 1e-05, and was 0.01"),
        ({"schedule": "cosine"}, "schedule is cosine, and was constant"),
        ({"seed": 7}, "seed is 7, and was 0"),
        ({"batch_size": 4}, "batch_size is 4, and was 8"),
        ({"label_smoothing": 0.3}, "label_smoothing is 0.3, and was 0.0"),
        ({"lora": {"targets": "q,k"}}, "lora.targets is q,k, and was q,v"),
    ],
)
def test_another_setting_is_refused_by_name(interrupted, changes, problem):
    config = interrupted(weight_decay=0.5, **changes)
    before = contents(config.out)
    with pytest.raises(TrainingError, match="can't be resumed with other settings") as raised:
        train(config)
    lines = [line.strip() for line in str(raised.value).splitlines()[1:]]
    assert sorted(lines) == sorted([problem, "weight_decay is 0.5, and was 0.0"])
    assert contents(config.out) == before


def test_other_rows_are_refused_wherever_they_are(interrupted, prompt_rows, tmp_path):
    moved = tmp_path / "moved.jsonl"
    moved.write_text(prompt_rows.read_text().replace("cat", "dog"))
    with pytest.raises(TrainingError, match="the training rows are other ones"):
        train(interrupted(data=DataConfig(train=str(moved))))


def test_settings_are_taken_over_on_request_and_recorded(interrupted, uninterrupted):
    config = interrupted(learning_rate=1e-5, seed=7, keep_settings=True)
    train(config)
    assert contents(config.out) == contents(uninterrupted.out)
    assert card(config.out)["settings"]["learning_rate"] == 1e-2


def test_a_resumed_run_needs_no_settings_but_its_folder(interrupted, uninterrupted):
    config = TrainConfig(out=interrupted().out, resume=True, keep_settings=True)
    assert train(config).steps == 6
    assert contents(config.out) == contents(uninterrupted.out)


def test_more_steps_and_moved_rows_go_on_and_the_card_says_since_when(
    interrupted, prompt_rows, tmp_path
):
    moved = shutil.copy(prompt_rows, tmp_path / "moved.jsonl")
    data = DataConfig(train=str(moved))
    assert train(interrupted(steps=8, data=data)).steps == 8
    found = card(interrupted().out)
    assert found["settings"]["steps"] == 8
    was = {"data.train": str(prompt_rows), "steps": 6}
    assert found["changes"] == [{"until_step": 3, "settings": was}]


def test_fewer_steps_than_are_done_are_refused(interrupted):
    with pytest.raises(TrainingError, match="it has 3 steps already, and the run is to have 2"):
        train(interrupted(steps=2))


@pytest.mark.thorough
def test_a_score_of_other_rows_is_not_compared_with(interrupted, prompt_rows, monkeypatch):
    losses = iter([1.0, 5.0, 4.0])

    def next_scores(*_, **__):
        return Scored(scores={"loss": next(losses)}, predicted=[])

    monkeypatch.setattr("lorakit.training.run.scored", next_scores)
    data: dict[str, Any] = {"train": str(prompt_rows), "validation": str(prompt_rows)}
    train(interrupted(data=data, steps=4, eval_every=4))
    data["validation_rows"] = 8
    result = train(interrupted(data=data, steps=6, eval_every=1))
    assert (result.best_step, result.scores) == (6, {"loss": 4.0})


def test_another_base_of_the_same_shape_is_refused(interrupted, tiny_llama, tmp_path):
    model, tokenizer = lk.load_model(tiny_llama)
    model.model.layers[0].mlp.up_proj.weight.data += 1
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(TrainingError, match="the base is another one"):
        train(interrupted(model=str(tmp_path / "other")))


@pytest.mark.thorough
def test_the_trials_of_a_sweep_are_compared_alike(uninterrupted, tmp_path):
    values = uninterrupted.model_dump(exclude_unset=True) | {"out": tmp_path, "steps": 4}
    ranks = {"sweep": {"lora.rank": [1, 2]}}
    sweep(TrainConfig(**values, **ranks))
    other = TrainConfig(**{**values, "learning_rate": 1e-5, "resume": True}, **ranks)
    with pytest.raises(TrainingError, match="some trials cannot be trained") as raised:
        sweep(other)
    assert str(raised.value).count("learning_rate is 1e-05, and was 0.01") == 2


@pytest.mark.parametrize("given", [{"keep_settings": True}, {"resume": True, "overwrite": True}])
def test_settings_that_contradict_each_other_are_refused(given, tmp_path):
    with pytest.raises(ConfigError, match=r"needs resume|give one"):
        TrainConfig(out=tmp_path, **given)
