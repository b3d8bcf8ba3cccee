"""report_to: trackers get figures and settings, and what fails there stops no run."""

import json
import math
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback

import lorakit as lk
from lorakit.training import trackers


class StandIn(TrainerCallback):
    """A tracker that keeps what it gets."""

    got: ClassVar[list[Any]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert json.loads(args.to_json_string()) == args.to_dict()
        self.got.append(("settings", args.run_name, args.to_dict(), model.config.model_type))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got.append(("figures", state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.got.append(("end",))


class Broken(TrainerCallback):
    """A tracker that fails at its first figures."""

    tried: ClassVar[list[Any]] = []

    def on_log(self, args, state, control, **kwargs):
        self.tried.append(state.global_step)
        raise ConnectionError("no network\nand more")


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Packages called wandb and mlflow, with callbacks that are stand-ins."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text("run = None\nends = []\ndef finish():\n    ends.append(1)\n")
    (packages / "mlflow.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setitem(trackers.ONE_RUN_AT_A_TIME, "wandb", StandIn)
    monkeypatch.setitem(trackers.ONE_RUN_AT_A_TIME, "mlflow", Broken)
    monkeypatch.setattr(StandIn, "got", [])
    monkeypatch.setattr(Broken, "tried", [])


def config_of(tiny_llama, prompt_rows, out, **more):
    data = {"train": str(prompt_rows), "validation": str(prompt_rows), "validation_rows": 2}
    how = {"steps": 3, "eval_every": 2, "batch_size": 2, "learning_rate": 1e-2, "dtype": "float32"}
    return lk.TrainConfig(model=str(tiny_llama), out=out, data=data, lora={"rank": 2}, **how | more)


def test_a_tracker_gets_all_and_another_that_fails_stops_nothing(
    stand_ins, tiny_llama, prompt_rows, tmp_path
):
    names = ("mlflow", "wandb", "tensorboard")
    config = config_of(tiny_llama, prompt_rows, tmp_path / "mine", report_to=names)
    with pytest.warns(
        UserWarning, match="mlflow gets no more of this run, .*: no network$"
    ) as told:
        result = lk.train(config)
    assert (len(told), Broken.tried) == (1, [1])
    assert result.steps == 3
    (kind, name, settings, family), *figures, end = StandIn.got
    assert (kind, name, family, end) == ("settings", "mine", "llama", ("end",))
    assert (settings["lora.rank"], settings["learning_rate"]) == (2, 1e-2)
    logs = {(step, key): value for _, step, entry in figures for key, value in entry.items()}
    assert {(1, "loss"), (1, "learning_rate"), (2, "eval_loss"), (3, "eval_loss")} <= logs.keys()
    assert all(map(math.isfinite, logs.values()))
    import wandb

    assert wandb.ends == [1]
    assert list((tmp_path / "mine" / "tensorboard").glob("events*"))


def test_a_tracker_that_is_not_there_is_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name not in ("wandb", "trackio"))
    config = config_of("nowhere", "nothing", tmp_path / "out", report_to="trackio,wandb,mlflow")
    line = "report_to: trackio and wandb cannot be imported here: pip install trackio wandb"
    with pytest.raises(lk.errors.ConfigError, match=f"^{line}$"):
        lk.train(config)
    with pytest.raises(lk.errors.ConfigError, match="unknown wandbb; known: wandb, mlflow"):
        config_of("nowhere", "nothing", tmp_path / "out", report_to=["wandbb"])
    sweep = config.model_copy(update={"report_to": ("mlflow",), "sweep": {"seed": [0, 1]}})
    with pytest.raises(lk.errors.ConfigError, match="mlflow would take the trials of a sweep"):
        lk.sweep(sweep)
    assert not (tmp_path / "out").exists()
