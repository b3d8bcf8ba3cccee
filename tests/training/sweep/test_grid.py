"""The trials of a sweep: their settings, their names, and what is refused."""

import pytest

from lorakit.config.methods import LoRAConfig
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError
from lorakit.training.sweep.grid import trials_of


def test_a_mapping_makes_all_combinations_and_a_list_its_trials(tmp_path):
    grid = TrainConfig(out=tmp_path, sweep={"lora.rank": [1, 2], "seed": [0, 1]})
    names = ["rank=1,seed=0", "rank=1,seed=1", "rank=2,seed=0", "rank=2,seed=1"]
    assert [trial.name for trial in trials_of(grid)] == names
    listed = TrainConfig(
        out=tmp_path,
        lora=LoRAConfig(alpha=4, targets=("k",)),
        sweep=[{"lora.rank": 2}, {"lora.targets": "q, v", "data.train": "x/a.csv", "name": "b"}],
    )
    first, second = trials_of(listed)
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
    ([{"seed": 1}, 3], ["trial 2: must be a mapping of settings, not 3"]),
    ([{"seed": 1, "name": "a/b"}], ["name: 'a/b' is not fit for a folder"]),
    ([{"seed": 1, "name": "a"}, {"name": "A"}], ["A: two trials have this name"]),
]


@pytest.mark.parametrize(("sweep", "texts"), MISTAKES)
def test_wrong_sweeps_are_told_in_one_message(tmp_path, sweep, texts):
    with pytest.raises(ConfigError) as raised:
        trials_of(TrainConfig(out=tmp_path, sweep=sweep))
    for text in texts:
        assert text in str(raised.value)
