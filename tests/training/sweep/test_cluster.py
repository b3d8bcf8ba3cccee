"""What keeps a sweep from a cluster is told before anything is done."""

import importlib.util

import pytest

import lorakit as lk
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
