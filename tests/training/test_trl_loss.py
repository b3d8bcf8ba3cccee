"""Preferences through TRL: what is told before anything is loaded."""

import sys
from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.parametrize(
    ("form", "given", "told"),
    [
        ("dpo", {"ld_alpha": 7}, "ld_alpha: input should be less than or equal to 1, found 7"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing: input should be less than 0.5"),
        ("dpo", {"label_smoothing": {"a": [1]}}, "label_smoothing: input should be a valid number"),
        ("dpo", {"loss_type": []}, "loss_type: list should have at least 1 item"),
        ("dpo", {"loss_type": 5}, "loss_type: input should be a valid list, found 5"),
        ("dpo", {"loss_weights": [1, "x"]}, "loss_weights.1: input should be a valid number"),
        ("dpo", {"loss_weights": [float("nan")]}, "loss_weights.0: input should be a finite"),
        ("ipo", {"discopop_tau": 0}, "discopop_tau: input should be greater than 0"),
        ("ipo", {"loss_type": "ipo"}, "loss_type is no setting of its loss for ipo"),
        ("cpo", {"alpha": "x"}, "alpha: input should be a valid number"),
        ("cpo", {"cpo_alpha": 1}, "cpo_alpha is no setting of its loss for cpo"),
        ("simpo", {"cpo_alpha": -1}, "cpo_alpha: input should be greater than or equal to 0"),
    ],
)
def test_what_trl_would_take_for_a_loss_is_told(form, given, told, monkeypatch):
    monkeypatch.setattr(trl_loss, "_library", lambda name: None)
    settings = PreferenceSettings(form=form, through="trl", trl=given)
    (problem,) = trl_loss.check_through_trl(settings)
    assert problem.startswith("preference.trl")
    assert told in problem


def test_settings_that_go_have_no_problem(monkeypatch):
    monkeypatch.setattr(trl_loss, "_library", lambda name: None)
    for form, given in {
        "dpo": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5], "ld_alpha": 0},
        "ipo": {"label_smoothing": "1e-3", "router_aux_loss_coef": 0.1},
        "cpo": {"loss_type": "hinge", "alpha": 0.1},
        "simpo": {"cpo_alpha": 0.4},
    }.items():
        settings = PreferenceSettings(form=form, through="trl", trl=given)
        assert trl_loss.check_through_trl(settings) == []


def test_a_view_has_float32_logits_and_no_loss_of_experts():
    from mixtures import mixture

    model = mixture("mixtral").bfloat16()
    model.config.output_router_logits = True
    view = trl_loss._view_of(model)
    trl_loss._give_float32(view)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        seen, own = view(input_ids=ids), model(input_ids=ids)
    assert seen.router_logits is None
    assert seen.logits.dtype == torch.float32
    assert torch.equal(seen.logits, own.logits.float())
    assert own.logits.dtype == torch.bfloat16
    assert own.router_logits is not None
    assert "forward" not in vars(model)


def test_a_first_loss_that_is_no_number_is_told():
    loss = object.__new__(trl_loss.TrlLoss)
    loss._asked, loss._form = {"alpha": 50}, trl_loss.FORMS["cpo"]
    logged = SimpleNamespace(log_history=[])
    loss._trainer = SimpleNamespace(
        compute_loss=lambda view, batch: torch.tensor(float("nan")),
        log=lambda figures: None,
        state=logged,
    )
    loss._view = SimpleNamespace(training=False)
    rows = {name: torch.ones(2, 3, dtype=torch.long) for name in ("input_ids", "target_tokens")}
    with pytest.raises(ConfigError, match=r"first row is nan with TRL .* \{'alpha': 50\}"):
        loss.try_on(torch.nn.Linear(1, 1), rows)


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
