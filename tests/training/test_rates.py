"""Learning rates: each method's own, unless the settings say one; kept by a resumed run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.config.method_defaults import DEFAULTS, FORMS
from lorakit.config.methods import METHODS
from lorakit.training.prepare import prepare
from lorakit.training.rates import (
    Rate,
    learning_rates,
    rate_of,
    rates_by_method,
    split_by_rate,
)
from lorakit.training.run import train
from tiny_models import build

WIDTH = 32
"""The width of the tiny models, which is less than that of the narrowest base of the trials."""
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def groups(model, config):
    """The names of the tensors in each group of an optimizer, by the group's rate."""
    plan = lk.attach(model, config.methods())
    rates = rates_by_method(config, plan, WIDTH)
    trained = {n: torch.nn.Parameter(t) for n, t in lk.extract(model).tensors.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0)
    split_by_rate(optimizer, trained, learning_rates(config, plan, rates))
    name_of = {id(p): name for name, p in trained.items()}
    return {g["lr"]: {name_of[id(p)] for p in g["params"]} for g in optimizer.param_groups}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_rate_and_a_warm_up_of_its_own(method, tmp_path):
    config = lk.TrainConfig(out=tmp_path, method=method)
    stated = DEFAULTS[method].learning_rate
    assert rate_of(config, method, 576).value == pytest.approx(stated, rel=0.03)  # two digits
    assert config.warmup_of(300) == DEFAULTS[method].warmup_steps
    explicit = lk.TrainConfig(out=tmp_path, method=method, learning_rate=0.5, warmup_steps=3)
    assert rate_of(explicit, method, 576) == Rate(value=0.5, reason="as set")
    assert explicit.warmup_of(300) == 3


def test_rates_fall_with_the_width_and_say_by_which_rule(tmp_path):
    config = lk.TrainConfig(out=tmp_path)
    rates = {width: rate_of(config, "lora", width).value for width in (32, 384, 576, 4096)}
    assert rates == {32: 0.003, 384: 0.003, 576: 0.002, 4096: 0.00028}
    found = rate_of(config, "lora", 4096)
    assert str(found) == "0.00028 (the default of lora on a base of width 4096: 0.002·(576/d))"
    compared = rate_of(config, "lora", 576, task="preference")
    assert compared.value == 0.0002
    assert compared.reason.startswith("for preferences a tenth of 0.002 (the default of lora")
    unknown = rate_of(config, "lora", None)
    assert unknown.value == 0.002
    assert "does not say how wide it is" in unknown.reason


def test_at_a_width_of_4096_rates_are_those_of_the_field(tmp_path):
    lora = rate_of(lk.TrainConfig(out=tmp_path), "lora", 4096).value
    full = rate_of(lk.TrainConfig(out=tmp_path, method="full"), "full", 4096).value
    assert 1e-4 <= lora <= 3e-4
    assert lora == pytest.approx(10 * full, rel=0.05)


def test_the_match_table_and_the_card_say_the_rate(tiny_bert, label_rows, tmp_path):
    config = lk.TrainConfig(
        model=str(tiny_bert),
        out=tmp_path / "run",
        data=lk.DataConfig(train=str(label_rows)),
        method="lora,bitfit",
        steps=2,
    )
    lines = prepare(config).describe().splitlines()
    rates = {method: DEFAULTS[method].rate_at(WIDTH) for method in ("lora", "bitfit")}
    for method, rate in rates.items():
        said = f"learning rate: {rate:g} (the default of {method} on a base of width {WIDTH}"
        assert any(line.startswith(said) for line in lines)
    card = lk.Adapter.load(train(config).out).card
    assert (card["learning_rates"], card["settings"]["learning_rate"]) == (rates, None)


def test_a_short_run_warms_up_over_half_of_it_at_most(tmp_path):
    assert lk.TrainConfig(out=tmp_path).warmup_of(8) == 4
    assert lk.TrainConfig(out=tmp_path, warmup_steps=6).warmup_of(8) == 6


@pytest.mark.parametrize(
    ("form", "settings"),
    [("pissa", {"init": "pissa"}), ("freeze_a", {"freeze_a": True}), ("lora", {"use_dora": True})],
)
def test_forms_of_lora_that_want_another_rate_have_it(form, settings, tmp_path):
    config = lk.TrainConfig(out=tmp_path, lora=settings)
    assert rate_of(config, "lora", 576).value == (FORMS.get(form) or DEFAULTS[form]).learning_rate


def losses(method, *results):
    """The held-out loss of each rate that was tried."""
    return {
        row["learning rate"]: row["held-out loss"]
        for result in results
        for row in json.loads((RESULTS / f"{result}.json").read_text())["tables"]["methods"]
        if row["method"] == method
    }


TRIALS = {576: ("methods_defaults", "methods_defaults_higher"), 384: ("methods_defaults_sst2",)}
"""The short trials of every method, by the width of their base."""


@pytest.mark.parametrize("width", TRIALS)
@pytest.mark.parametrize("method", METHODS)
def test_the_rule_is_near_what_did_well_in_short_trials(method, width):
    tried = losses(method, *TRIALS[width])
    good = min(rate for rate, loss in tried.items() if loss <= 1.01 * min(tried.values()))
    assert 1 / 4 <= DEFAULTS[method].rate_at(width) / good <= 4


@pytest.mark.parametrize(("method", "accuracy"), [("lora", 80.9), ("adapter-l", 82.3)])
def test_the_rule_is_near_what_did_best_in_runs_of_300_steps(method, accuracy):
    rows = json.loads((RESULTS / "default_rates.json").read_text())["tables"]["rates"]
    tried = {row["learning rate"]: row for row in rows if row["method"] == method}
    best = min(tried, key=lambda rate: tried[rate]["held-out loss"])
    rate = DEFAULTS[method].rate_at(384)
    assert 2 / 3 <= rate / best <= 3 / 2
    assert tried[rate]["validation accuracy"] > accuracy


def test_the_exponents_are_those_of_random_models_and_larger_where_real_bases_ask_for_it():
    rows = json.loads((RESULTS / "rate_widths.json").read_text())["tables"]["rates"]
    assert len(rows) == 8
    for row in rows:
        method, found = row["method"].partition(" ")[0], -row["exponent"]
        if method == "lora" or method.startswith("adapter"):
            assert found < DEFAULTS[method].exponent == 1
        else:
            assert DEFAULTS[method].exponent == pytest.approx(found, abs=0.1)


def test_norms_beside_bottlenecks_have_the_bottlenecks_rate_and_a_head_that_of_the_first():
    model = build("bert")
    configs = [lk.LoRAConfig(), lk.BottleneckConfig(variant="h", train_norms=True)]
    methods = lk.plan(model, configs).methods
    norms = [name for name in methods if "LayerNorm" in name]
    assert norms
    assert {methods[name] for name in norms} == {"adapter-h"}
    assert methods["classifier.weight"] == "lora"


def test_biases_that_top_k_reads_have_the_rate_of_top_k():
    model = build("deberta")
    config = [lk.LoRAConfig(layers="0"), lk.FullConfig(only_top=True, top=1)]
    methods = lk.plan(model, config).methods
    assert methods["deberta.encoder.layer.1.attention.self.q_bias"] == "top-k"


def test_methods_together_have_a_group_each(tmp_path):
    found = groups(build("gpt2"), lk.TrainConfig(out=tmp_path, method="lora,bitfit"))
    rates = {method: DEFAULTS[method].rate_at(WIDTH) for method in ("lora", "bitfit")}
    assert found.keys() == set(rates.values())
    assert all(".lora_" in name for name in found[rates["lora"]])
    assert all(name.endswith(".bias") for name in found[rates["bitfit"]])


def test_a_fresh_classifier_trains_at_the_first_methods_rate(tmp_path):
    found = groups(build("bert"), lk.TrainConfig(out=tmp_path, method="lora,bitfit"))
    assert {"classifier.weight", "classifier.bias"} <= found[DEFAULTS["lora"].rate_at(WIDTH)]


def test_a_rate_that_is_asked_for_holds_for_all_methods(tmp_path):
    config = lk.TrainConfig(out=tmp_path, method="lora,bitfit", learning_rate=0.25)
    assert groups(build("gpt2"), config).keys() == {0.25}


@pytest.mark.thorough
def test_a_resumed_run_keeps_the_rates(tiny_bert, label_rows, tmp_path):
    config = lk.TrainConfig(
        model=str(tiny_bert),
        data=lk.DataConfig(train=str(label_rows)),
        out=tmp_path / "run",
        method="lora,bitfit",
        dtype="float32",
        schedule="constant",
        steps=4,
        save_every=2,
        warmup_steps=1,
    )
    train(config)
    whole = lk.Adapter.load(config.out).content_hash()
    shutil.rmtree(config.out / "checkpoints" / "checkpoint-4")
    train(config.model_copy(update={"resume": True}))
    assert lk.Adapter.load(config.out).content_hash() == whole
    state = torch.load(config.out / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    rates = {DEFAULTS[method].rate_at(WIDTH) for method in ("lora", "bitfit")}
    assert {group["initial_lr"] for group in state["param_groups"]} == rates
    assert {group["lr"] for group in state["param_groups"]} == rates
    card = json.loads((config.out / "lorakit.json").read_text())["card"]
    assert card["settings"]["learning_rate"] is None
