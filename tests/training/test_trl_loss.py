"""Preferences through TRL: what is told before anything is loaded."""

import sys

import pytest

import lorakit as lk
from lorakit.config.train import PreferenceSettings
from lorakit.errors import ConfigError, MissingExtraError
from lorakit.training import trl_loss


@pytest.fixture
def settings(tiny_llama, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "red", "chosen": "cat", "rejected": "dog"}\n')

    def make(**more):
        data = lk.DataConfig(train=str(file))
        preference = {"through": "trl", **more.pop("preference", {})}
        given = {"model": str(tiny_llama), "data": data, "steps": 2, "preference": preference}
        return lk.TrainConfig(out=tmp_path / "out", **given, **more)

    return make


def test_without_trl_the_way_is_told(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"through: trl .*pip install 'lorakit\[trl\]'"):
        lk.train(settings())
    assert not any((tmp_path / "out").glob("*.safetensors"))


def test_every_setting_that_does_not_go_is_named(settings, monkeypatch):
    monkeypatch.setattr(trl_loss, "_library", lambda name: None)
    preference = {"form": "orpo", "nll": 2.0, "trl": {"alpha": 1}}
    with pytest.raises(ConfigError) as caught:
        lk.train(settings(preference=preference, shard="base"))
    for part in (
        "alpha is no setting of its loss for orpo (there are none)",
        "preference.nll: TRL's ORPO has a weight of 1, and it is 2.0",
        "shard: TRL takes the weights of the head",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("form", ["dpo", "ipo", "cpo", "simpo", "orpo"])
def test_each_form_has_a_trainer(form, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(trl_loss, "_library", asked.append)
    assert trl_loss.check_through_trl(PreferenceSettings(form=form, through="trl")) == []
    assert asked == ["trl"]
    assert trl_loss.FORMS[form].module.startswith("trl")


def test_its_settings_without_it_are_idle():
    preference = PreferenceSettings(trl={"loss_type": "apo_zero"})
    config = lk.TrainConfig(out="out/x", data=lk.DataConfig(train="x.jsonl"), preference=preference)
    from lorakit.config.idle import idle_settings

    assert "preference.trl (through is lorakit)" in idle_settings(config)
