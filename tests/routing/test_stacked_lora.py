"""Mixed batches: every row answers as it would alone, whatever else is in the batch."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lorakit as lk
from covering import covering, sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import RouteError
from references import alone, attach_random, outputs, randomise, with_updates
from tiny_models import FAMILIES, build, example_inputs

BIASED = ("gpt2", "gpt_neox", "bloom", "bert", "roberta", "vit", "opt", "phi")
NAMES = ("small", "wide", "half", "other")
BLENDS = ({"small": 0.7, "wide": 0.3}, {"half": 0.5}, {"other": -1.5, "small": 1.0}, {"wide": 0.0})
CHOICES = st.lists(st.sampled_from([None, *NAMES, *BLENDS]), min_size=1, max_size=6)
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def configs(family: str) -> dict[str, dict[str, Any]]:
    """Settings that differ in all that adapters can differ in."""
    embedding = "patch_embeddings.projection" if family == "vit" else "embed"
    bias = "lora" if family in BIASED else "none"
    every = "all" if family in BIASED else "none"
    return {
        "small": {"rank": 2, "targets": ("q", "v")},
        "wide": {"rank": 9, "targets": ("all-linear",), "use_rslora": True, "bias": bias},
        "half": {"rank": 3, "targets": ("k", "v"), "dtype": "bfloat16", "alpha": 5},
        "other": {"rank": 4, "targets": (embedding, "down"), "bias": every},
    }


@functools.cache
def adapted(family: str):
    """A model with four adapters, its plain base, and the adapters."""
    model = build(family)
    base = build(family)
    for seed, (name, config) in enumerate(configs(family).items()):
        attach_random(model, name, seed=seed, std=0.1, **config)
    lk.switch(model, None)
    return model, base, {name: lk.extract(model, name) for name in NAMES}


def check_rows(model, inputs, names) -> None:
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for name, found, expected in zip(names, mixed, alone(model, inputs, names), strict=True):
        close: dict[str, Any] = (
            CLOSE if "half" not in (name or ()) else {"rtol": 0.02, "atol": 0.02}
        )
        torch.testing.assert_close(found, expected, **close, msg=f"{name}: ".__add__)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@settings(max_examples=10)
@given(names=CHOICES, seed=st.integers(0, 9))
def test_every_row_answers_as_if_alone(family, names, seed):
    model = adapted(family)[0]
    check_rows(model, example_inputs(model, rows=len(names), seed=seed), names)


SHARING = ("deberta", "deberta-v2")
"""Families in which some linear layers read positions, which all rows share."""


@sampled("family", [family for family in FAMILIES if family not in SHARING])
def test_every_family_takes_mixed_batches(family):
    model = adapted(family)[0]
    names = ["other", "small", None, "wide", "half", BLENDS[0]]
    check_rows(model, example_inputs(model, rows=6), names)


@pytest.mark.parametrize("family", SHARING)
def test_a_layer_whose_input_all_rows_share_is_told(family):
    model = adapted(family)[0]
    inputs = example_inputs(model, rows=2)
    check_rows(model, inputs, ["small", "half"])
    with pytest.raises(RouteError, match="input all rows share"), lk.route(model, ["wide", None]):
        outputs(model, inputs)


@covering(
    ("family", "combination"),
    itertools.product(
        ["llama", "gpt2", "bloom", "bert", "vit", "t5"],
        [*BLENDS, {"small": 1.0, "wide": 1.0, "other": 2.0}],
    ),
)
def test_a_blend_is_the_sum_of_updates(family, combination):
    model, base, adapters = adapted(family)
    inputs = example_inputs(model, rows=2)
    expected = outputs(with_updates(base, adapters, combination), inputs)
    close = 0.02 if "half" in combination else 1e-4
    with lk.route(model, [combination, None]):
        found = outputs(model, inputs)[0]
        torch.testing.assert_close(found, expected[0], rtol=close, atol=close)
    with lk.route(model, combination):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=close, atol=close)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bert", "vit"])
def test_a_row_without_adapter_keeps_every_bit_of_the_base(family):
    model, base, _ = adapted(family)
    inputs = example_inputs(model, rows=4)
    expected = outputs(base, inputs)
    with lk.route(model, ["wide", None, {"other": 0.0}, "half"]):
        mixed = outputs(model, inputs)
    assert torch.equal(mixed[1:3], expected[1:3])
    assert not torch.isclose(mixed[0], expected[0]).all()


@covering(
    ("family", "poison"),
    itertools.product(["llama", "gpt2", "bert", "vit"], [float("nan"), 1e30]),
    each=1,
)
def test_a_spoiled_adapter_changes_no_bit_of_other_rows(family, poison):
    model = build(family)
    for seed, (name, config) in enumerate(configs(family).items()):
        attach_random(model, name, seed=seed, **config)
    inputs = example_inputs(model, rows=5)
    names = ["small", "wide", None, "wide", "other"]
    with lk.route(model, names):
        before = outputs(model, inputs)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "wide"):
            parameter.fill_(poison)
    with lk.route(model, names):
        after = outputs(model, inputs)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert not torch.isclose(after[[1, 3]], before[[1, 3]]).any(-1).all()
    randomise(model, "wide", seed=9)
    with lk.route(model, names):
        again = outputs(model, inputs)
    assert torch.equal(again[[0, 2, 4]], before[[0, 2, 4]])
    check_rows(model, inputs, names)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_float32_adapters_on_a_bfloat16_base_come_close(family):
    model = build(family).bfloat16()
    for seed, (name, config) in enumerate(configs(family).items()):
        attach_random(model, name, seed=seed, std=0.1, **{**config, "dtype": "float32"})
    inputs = example_inputs(model, rows=4)
    names = ["small", "wide", None, "other"]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    assert mixed.dtype == torch.bfloat16
    for found, expected in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_position_embeddings_that_all_rows_share_may_differ():
    model = build("bert")
    attach_random(model, "one", targets=("position_embeddings",))
    attach_random(model, "two", seed=1, targets=("position_embeddings", "q"))
    check_rows(model, example_inputs(model, rows=3), ["two", None, "one"])


def classifier(labels: int, seed: int) -> lk.Adapter:
    """An adapter with a head of so many classes."""
    model = build("bert", num_labels=labels)
    attach_random(model, rank=2, seed=seed)
    return dataclasses.replace(lk.extract(model), base=None)


@pytest.fixture
def heads():
    model = build("bert")
    bank = lk.AdapterBank(model)
    for labels in (2, 3, 5):
        bank.add(f"{labels} classes", classifier(labels, labels))
    bank.add("three", classifier(3, 7))
    return bank


def test_heads_of_other_widths_answer_in_one_batch(heads):
    names = ["5 classes", "2 classes", None, "three", "2 classes", "3 classes"]
    inputs = example_inputs(heads.model, rows=6)
    with heads.route(names):
        mixed = outputs(heads.model, inputs)
    assert mixed.shape == (6, 5)
    for found, expected in zip(mixed, alone(heads.model, inputs, names), strict=True):
        width = len(expected)
        torch.testing.assert_close(found[:width], expected, **CLOSE)
        assert (found[width:] == float("-inf")).all()
    assert [len(e) for e in alone(heads.model, inputs, names)] == [5, 2, 3, 3, 2, 3]


def test_heads_of_the_base_width_can_be_blended_and_others_not(heads):
    inputs = example_inputs(heads.model, rows=3)
    adapters = {n: lk.extract(heads.model, n) for n in ("3 classes", "three")}
    combination = {"3 classes": 0.6, "three": 0.7}
    with heads.route([None, combination, {"three": 0.5}]):
        mixed = outputs(heads.model, inputs)
    for row, terms in ((1, combination), (2, {"three": 0.5})):
        expected = outputs(with_updates(build("bert"), adapters, terms), inputs)[row]
        torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
    for impossible in ({"2 classes": 0.5}, {"5 classes": 1.0, "three": 1.0}):
        with pytest.raises(RouteError, match="another number of classes"), heads.route(impossible):
            pass


def test_neighbours_with_one_input_share_one_product(monkeypatch):
    from lorakit.kernels import grouped

    model = adapted("llama")[0]
    calls = []
    real = grouped.down_project
    monkeypatch.setattr(grouped, "down_project", lambda *args: calls.append(args) or real(*args))
    with lk.route(model, ["wide", "small"]):
        calls.clear()
        outputs(model, example_inputs(model))
    # In each of two blocks: q and v for both, k for one alone; o; gate and up; down.
    assert len(calls) == 2 * 5


def test_rows_are_grouped_and_weights_gathered_once_for_a_route(monkeypatch):
    from lorakit.kernels import grouped
    from lorakit.routing import stacked_lora as mixed

    model = adapted("llama")[0]
    calls = []
    for module, name in ((grouped, "gather"), (mixed, "group_rows")):
        real = getattr(module, name)
        spy = lambda *args, real=real, **kw: calls.append(args) or real(*args, **kw)  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with lk.route(model, ["wide", "small", "half"]):
        assert calls
        calls.clear()
        for _ in range(3):
            outputs(model, example_inputs(model, rows=3))
    with lk.route(model, ["wide", "small", "half"]):
        pass
    assert not calls


def test_ranks_far_apart_are_not_padded_to_the_largest():
    model = build("llama")
    attach_random(model, "one", rank=1)
    attach_random(model, "many", rank=30)
    lk.switch(model, None)
    model.requires_grad_(False)
    with lk.route(model, ["one", "many"]):
        operations = next(iter(model._lorakit.route.top.operations.values()))
        ranks = [shared.pieces[at].rank for shared, at in operations._parts]
    assert sorted(ranks) == [1, 30]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
def test_gradients_of_a_mixed_batch_are_the_sums_of_its_rows(family):
    model = build(family)
    chosen = {n: {**c, "dtype": "float32"} for n, c in configs(family).items()}
    for seed, (name, config) in enumerate(chosen.items()):
        attach_random(model, name, seed=seed, std=0.1, **config)
    model.double()
    inputs = example_inputs(model, rows=5)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    names = ["wide", None, "other", "small", {"wide": 0.5, "half": 2.0}]

    def gradients(rows, choice):
        with lk.route(model, choice):
            logits = model(**{k: v[rows] for k, v in inputs.items()}).logits
        if logits.requires_grad:
            logits.square().sum().backward()

    gradients(slice(None), names)
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, own in enumerate(names):
        gradients(slice(row, row + 1), own)
    separate = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == separate.keys() > set()
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, separate[key], rtol=1e-9, atol=1e-10)


def test_dropout_is_each_rows_own():
    model = build("llama")
    attach_random(model, "none", rank=2)
    attach_random(model, "some", seed=1, rank=2, dropout=0.3, targets=("v", "down"))
    inputs = example_inputs(model, rows=3)
    names = ["some", "none", None]
    with lk.route(model, names), torch.no_grad():
        layer = model.model.layers[0].self_attn.v_proj
        x = torch.randn(3, 4, 32)
        exact = model.eval()(**inputs).logits
        expected = layer(x)
        model.train()
        drawn = model(**inputs).logits
        mean = torch.stack([layer(x) for _ in range(1000)]).mean(0)
    torch.testing.assert_close(drawn[1:], exact[1:])
    assert not torch.allclose(drawn[0], exact[0])
    torch.testing.assert_close(mean[0], expected[0], rtol=0.1, atol=0.15)
    torch.testing.assert_close(mean[1:], expected[1:])


def test_a_float32_copy_of_the_embeddings_serves_a_bfloat16_base():
    model = build("llama").bfloat16()
    attach_random(model, modules_to_save=("embed_tokens",))
    inputs = example_inputs(model, rows=3)
    names = ["default", None, {"default": 0.5}]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for found, expected in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
