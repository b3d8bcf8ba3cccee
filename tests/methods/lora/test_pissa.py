"""PiSSA: A and B start as the main part of the weight, and a frozen copy of them takes it off."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.attachment.state import attachment_of
from lorakit.errors import TargetError
from lorakit.kernels.choice import use
from references import alone, base_hash, outputs, with_updates
from tiny_models import build, example_inputs

LAYERS = {
    "linear": lambda: nn.Linear(9, 7),
    "transposed": lambda: Conv1D(7, 9),
    "embedding": lambda: nn.Embedding(11, 6),
    "convolution": lambda: nn.Conv2d(4, 6, 3, groups=2),
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"targets": ("q", "down", "head"), "rank_pattern": {"q": 4}},
    "gpt2": {"targets": ("q", "v"), "use_rslora": True, "alpha": 5},
    "bert": {"targets": ("q", "v", "embed")},
}


def attached(family, *, dtype=torch.float32, **config):
    model = build(family).to(dtype)
    plan = lk.attach(model, lk.LoRAConfig(**{"rank": 3, "init": "pissa", **TINY[family], **config}))
    return model, plan


def shake(model, name="default"):
    """Move what trains away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, name):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def halves(adapter, site):
    """scale·B·A of the ranks that train, and of the frozen ones, in float64."""
    a, b = (adapter.tensors[f"{site.name}.lora_{end}"].double().flatten(1) for end in "ab")
    trained = site.rank - site.frozen
    return (
        site.scale * b[:, :trained] @ a[:trained],
        site.scale * b[:, trained:] @ a[trained:],
    )


def matrix(layer, site):
    weight = layer.weight.detach().double()
    weight = weight.T if isinstance(layer, Conv1D | nn.Embedding) else weight.flatten(1)
    rows = site.rows or ((0, len(weight)),)
    return torch.cat([weight[start:stop] for start, stop in rows])


def best_approximation(weight, rank):
    u, s, v = np.linalg.svd(weight.numpy(), full_matrices=False)
    return torch.from_numpy(u[:, :rank] * s[:rank] @ v[:rank])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "alpha": 5}], ids=str)
def test_a_layer_s_update_starts_from_its_best_approximation(kind, config):
    torch.manual_seed(0)
    model = nn.Sequential(LAYERS[kind]())
    lk.attach(model, lk.LoRAConfig(targets=("0",), rank=3, init="pissa", **config))
    adapter = lk.extract(model)
    (site,) = adapter.sites
    trained, frozen = halves(adapter, site)
    expected = best_approximation(matrix(model[0], site), 3)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(frozen, -trained)


def test_each_slice_of_a_fused_layer_has_its_own():
    model, _ = attached("gpt2")
    adapter = lk.extract(model)
    for site in adapter.sites:
        expected = best_approximation(matrix(model.get_submodule(site.path), site), 3)
        torch.testing.assert_close(halves(adapter, site)[0], expected, rtol=0, atol=1e-6)


def test_the_randomised_decomposition_comes_close():
    torch.manual_seed(0)
    layer = nn.Linear(64, 48)
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0, 3, 64) ** 4)
    config = lk.LoRAConfig(targets=("0",), rank=3, init="pissa", svd_iterations=8)
    lk.attach(model, config)
    adapter = lk.extract(model)
    trained, frozen = halves(adapter, adapter.sites[0])
    weight = matrix(model[0], adapter.sites[0])
    least = (weight - best_approximation(weight, 3)).norm()
    assert least <= (weight - trained).norm() < 1.001 * least
    assert torch.equal(frozen, -trained)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("family", TINY)
def test_nothing_changes_at_the_start(family, kernels, dtype, near):
    base = build(family).to(dtype)
    inputs = example_inputs(base)
    before = outputs(base, inputs)
    model, _ = attached(family, dtype=dtype, dropout=0.5)
    with use(kernels):
        torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=near)
        parts = [m for m in model.modules() if type(m).__name__ == "LowRank"]
        for part in parts:
            part.train()
        # Both halves drop the same elements.
        torch.testing.assert_close(model(**inputs).logits, before, rtol=0, atol=near)


@pytest.mark.parametrize("family", TINY)
def test_it_is_plain_lora_of_twice_the_rank_on_the_base_as_it_was(family):
    base = build(family).double()
    model, plan = attached(family, dtype=torch.float64)
    assert base_hash(model) == base_hash(base)
    shake(model)
    adapter = lk.extract(model)
    assert all(site.rank == 2 * site.frozen for site in adapter.sites)
    exact = outputs(with_updates(base, {"x": adapter}, {"x": 1.0}), example_inputs(base))
    torch.testing.assert_close(outputs(model, example_inputs(base)), exact, rtol=1e-5, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, example_inputs(base)), exact, rtol=1e-5, atol=1e-5)
    trained = [p for _, p in adapter_parameters(model, "default") if p.requires_grad]
    assert plan.parameters == adapter.parameters == sum(p.numel() for p in trained)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_the_gradient_is_that_of_the_half_that_trains(kernels):
    model, _ = attached("llama", dtype=torch.float64)
    shake(model)
    plain = build("llama").double()
    adapter = lk.extract(model)
    lk.attach(plain, unfrozen(adapter), trainable=True)
    inputs = example_inputs(plain)
    whole = dict(adapter_parameters(plain, "default"))
    with use(kernels):
        for each in (model, plain):
            each.train()(**inputs).logits.square().sum().backward()
    for name, parameter in adapter_parameters(model, "default"):
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        rows, columns = parameter.shape
        expected = whole[name].grad
        assert expected is not None
        expected = expected[:rows, :columns]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def unfrozen(adapter):
    """An adapter of which all ranks train."""
    return replace(adapter, sites=tuple(replace(site, frozen=0) for site in adapter.sites))


@pytest.mark.parametrize("form", ["trained", "frozen", "for compiled models"])
def test_rows_choose_it_as_any_adapter(form):
    model, _ = attached("gpt2")
    shake(model)
    lk.attach(model, lk.LoRAConfig(rank=2), name="other")
    shake(model, "other")
    model.requires_grad_(form == "trained")
    attachment_of(model).compiled = form == "for compiled models"
    inputs = example_inputs(model, rows=4)
    names = ["default", None, {"default": 0.5, "other": 1.0}, "other"]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for row, expected in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_a_file_says_which_half_trains(tmp_path):
    model, plan = attached("llama")
    shake(model)
    adapter, expected = lk.extract(model), outputs(model, example_inputs(model))
    folder = adapter.save(tmp_path / "a")
    sites = json.loads((folder / "lorakit.json").read_text())["sites"]
    assert [site["frozen"] for site in sites] == [site.frozen for site in adapter.sites]
    loaded = lk.Adapter.load(folder)
    assert loaded.content_hash() == adapter.content_hash()
    assert unfrozen(adapter).content_hash() != (adapter.content_hash())
    lk.detach(model)
    assert lk.attach(model, loaded, trainable=True).parameters == plan.parameters
    assert torch.equal(outputs(model, example_inputs(model)), expected)
    again = lk.extract(model)
    assert all(torch.equal(again.tensors[n], t) for n, t in adapter.tensors.items())
    assert {n for n, p in adapter_parameters(model, "default") if not p.requires_grad} == {
        f"{site.name}.frozen_{end}" for site in adapter.sites for end in "ab"
    }


def test_it_goes_with_dora_and_a_frozen_a():
    model, _ = attached("gpt2", use_dora=True, freeze_a=True)
    base = build("gpt2")
    inputs = example_inputs(base)
    torch.testing.assert_close(outputs(model, inputs), outputs(base, inputs), rtol=0, atol=1e-5)
    trained = {n.rpartition(".")[2] for n, p in adapter_parameters(model, "default")
               if p.requires_grad}  # fmt: skip
    assert trained == {"lora_b", "lora_magnitude"}


def test_more_ranks_than_the_weight_has_directions_are_refused():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 30))
    with pytest.raises(TargetError, match="0  has rank 8, and there are 7 singular vectors"):
        lk.attach(model, lk.LoRAConfig(targets=("0", "1"), rank=8, init="pissa"))
