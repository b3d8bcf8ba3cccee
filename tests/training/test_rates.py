"""Learning rates: each method's own, unless the settings say one; kept by a resumed run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.config.methods import DEFAULTS, FORMS, METHODS
from lorakit.training.rates import learning_rates, split_by_rate
from lorakit.training.run import train
from tiny_models import build

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def groups(model, config):
    """The names of the tensors in each group of an optimizer, by the group's rate."""
    plan = lk.attach(model, config.methods())
    trained = {n: torch.nn.Parameter(t) for n, t in lk.extract(model).tensors.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0)
    split_by_rate(optimizer, trained, learning_rates(config, plan))
    name_of = {id(p): name for name, p in trained.items()}
    return {g["lr"]: {name_of[id(p)] for p in g["params"]} for g in optimizer.param_groups}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_rate_and_a_warm_up_of_its_own(method, tmp_path):
    config = lk.TrainConfig(out=tmp_path, method=method)
    assert config.rate_of(method) == DEFAULTS[method].learning_rate
    assert config.warmup_of(300) == DEFAULTS[method].warmup_steps
    explicit = lk.TrainConfig(out=tmp_path, method=method, learning_rate=0.5, warmup_steps=3)
    assert explicit.rate_of(method) == 0.5
    assert explicit.warmup_of(300) == 3


def test_a_short_run_warms_up_over_half_of_it_at_most(tmp_path):
    assert lk.TrainConfig(out=tmp_path).warmup_of(8) == 4
    assert lk.TrainConfig(out=tmp_path, warmup_steps=6).warmup_of(8) == 6


@pytest.mark.parametrize(
    ("form", "settings"),
    [("pissa", {"init": "pissa"}), ("freeze_a", {"freeze_a": True}), ("lora", {"use_dora": True})],
)
def test_forms_of_lora_that_want_another_rate_have_it(form, settings, tmp_path):
    config = lk.TrainConfig(out=tmp_path, lora=settings)
    assert config.rate_of("lora") == (FORMS.get(form) or DEFAULTS[form]).learning_rate
    assert lk.TrainConfig(out=tmp_path, lora=settings, learning_rate=0.5).rate_of("lora") == 0.5


def loss_ratios(method, *results):
    """The ratio of each rate's held-out loss to the best one."""
    losses = {
        row["learning rate"]: row["held-out loss"]
        for result in results
        for row in json.loads((RESULTS / f"{result}.json").read_text())["tables"]["methods"]
        if row["method"] == method
    }
    return {rate: loss / min(losses.values()) for rate, loss in losses.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_default_rate_is_the_one_that_did_well_on_both_tasks(method):
    tasks = (
        loss_ratios(method, "methods_defaults", "methods_defaults_higher"),
        loss_ratios(method, "methods_defaults_sst2"),
    )
    common = tasks[0].keys() & tasks[1].keys()
    assert len(common) > 1
    expected = min(common, key=lambda rate: max(ratios[rate] for ratios in tasks))
    assert DEFAULTS[method].learning_rate == expected


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
    rates = {method: DEFAULTS[method].learning_rate for method in ("lora", "bitfit")}
    assert found.keys() == set(rates.values())
    assert all(".lora_" in name for name in found[rates["lora"]])
    assert all(name.endswith(".bias") for name in found[rates["bitfit"]])


def test_a_fresh_classifier_trains_at_the_first_methods_rate(tmp_path):
    found = groups(build("bert"), lk.TrainConfig(out=tmp_path, method="lora,bitfit"))
    assert {"classifier.weight", "classifier.bias"} <= found[DEFAULTS["lora"].learning_rate]


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
    rates = {DEFAULTS[method].learning_rate for method in ("lora", "bitfit")}
    assert {group["initial_lr"] for group in state["param_groups"]} == rates
    assert {group["lr"] for group in state["param_groups"]} == rates
    card = json.loads((config.out / "lorakit.json").read_text())["card"]
    assert card["settings"]["learning_rate"] is None
