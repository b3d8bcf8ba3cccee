"""What keeps a sweep from a cluster is told before anything is done."""

import importlib.util
import sys
from types import SimpleNamespace

import pytest

import lorakit as lk
from lorakit.training.cluster import connected
from tiny_models import build

SWEEP = {"lora.rank": [1, 2]}


def config_of(out, **more):
    return lk.TrainConfig(model="nowhere", out=out, data={"train": "nothing"}, **more)


def test_a_cluster_trains_trials_alone(tmp_path):
    with pytest.raises(lk.errors.ConfigError, match="ray trains the trials of a sweep, and there"):
        config_of(tmp_path, ray="local")
    sweep = config_of(tmp_path, ray="local", sweep=SWEEP)
    with pytest.raises(lk.errors.ConfigError, match="where `model` of the settings is loaded"):
        lk.sweep(sweep, model=build("llama"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_line_that_installs_it_is_told(tmp_path):
    with pytest.raises(lk.errors.MissingExtraError, match=r"pip install 'lorakit\[ray\]'"):
        lk.sweep(config_of(tmp_path / "out", ray="local", sweep=SWEEP))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "mode", "end"),
    [
        ("first:6379", None, "If it asks for a token (~/.ray/auth_token), set RAY_AUTH_MODE=token"),
        ("first:6379", "token", "first:6379: no way"),
        ("auto", None, "auto: no way"),
    ],
)
def test_a_cluster_that_lets_nobody_in_is_told_with_what_to_do(monkeypatch, address, mode, end):
    def init(**how):
        raise ConnectionError("no way")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(lk.errors.ConfigError) as told, connected(address):
        pass
    assert str(told.value).endswith(end)
