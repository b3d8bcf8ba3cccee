"""The spectrum of ΔW against numpy's of the dense product, and what follows from it."""

import math

import numpy as np
import pytest
import torch

import lorakit as lk
from analysis.made import adapter_of, dense, planted, random
from lorakit.analysis import spectrum
from lorakit.errors import AnalysisError
from references import attach_random
from tiny_models import build


def test_singular_values_are_those_of_the_dense_product():
    model = build("gpt2")
    for config in ({"targets": "q,v"}, {"targets": "all-linear", "use_rslora": True}):
        attach_random(model, rank=3, alpha=7, **config)
        adapter = lk.extract(model)
        lk.detach(model)
        found = spectrum(adapter)
        assert list(found) == [site.name for site in adapter.sites]
        for site in adapter.sites:
            a, b = (adapter.tensors[f"{site.name}.lora_{x}"].double() for x in "ab")
            wanted = np.linalg.svd((site.scale * (b @ a)).numpy(), compute_uv=False)[:3]
            assert found[site.name].singular_values == pytest.approx(wanted, rel=1e-12)
            assert found[site.name].shape == (len(b), a.shape[1])
            assert found[site.name].rank == 3


def test_ranks_and_norm_follow_their_formulas():
    made = spectrum(adapter_of({"even": planted(20, 30, [2.0] * 4, seed=0)}))["even"]
    assert made.effective_rank == pytest.approx(4)
    assert made.stable_rank == pytest.approx(4)
    assert made.norm == pytest.approx(4)
    assert made.energy == pytest.approx([0.25] * 4)
    uneven = spectrum(adapter_of({"x": planted(9, 9, [3.0, 1.0], seed=0)}, alpha=4.0))["x"]
    assert uneven.singular_values == pytest.approx([6, 2])  # the scale is 4/2
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert uneven.effective_rank == pytest.approx(math.exp(entropy))
    assert uneven.stable_rank == pytest.approx(40 / 36)
    assert [uneven.rank_for(share) for share in (0.5, 0.89, 0.91, 1.0)] == [1, 1, 2, 2]
    assert uneven.lost_at(1) == pytest.approx(0.1)


def test_an_untrained_update_and_unused_ranks_count_as_nothing():
    a, b = random(4, 12, seed=0), torch.zeros(8, 4, dtype=torch.float64)
    twice = torch.cat([a[:2], a[:2]]), random(8, 4, seed=1)
    found = spectrum(adapter_of({"fresh": (a, b), "twice": twice}))
    assert found["fresh"].singular_values == (0, 0, 0, 0)
    assert (found["fresh"].effective_rank, found["fresh"].stable_rank) == (0, 0)
    assert found["fresh"].rank_for(0.9) == 0
    assert found["twice"].numerical_rank == 2
    assert found["twice"].rank_for(1.0) == 2


def test_a_rank_above_the_layers_width_is_no_trouble():
    a, b = random(9, 4, seed=0), random(6, 9, seed=1)
    found = spectrum(adapter_of({"x": (a, b)}))["x"]
    assert found.singular_values == pytest.approx(torch.linalg.svdvals(b @ a).tolist())


def test_the_base_gives_the_relative_norm_attached_or_not():
    model = build("gpt2")
    attach_random(model, rank=2, targets="q,o")
    adapter = lk.extract(model)
    attached = spectrum(adapter, model=model)
    lk.detach(model)
    found = spectrum(adapter, model=model)
    assert found == attached
    weight = model.transformer.h[1].attn.c_attn.weight.T[:32].double()
    site = "transformer.h.1.attn.c_attn[q]"
    change = dense(adapter)["transformer.h.1.attn.c_attn"].norm() / weight.norm()
    assert found[site].relative_norm == pytest.approx(change.item(), rel=1e-6)


def test_dora_is_shown_with_its_base_alone():
    model = build("llama")
    attach_random(model, rank=2, targets="q", use_dora=True)
    adapter = lk.extract(model)
    with pytest.raises(AnalysisError, match=r"DoRA's ΔW = .* needs the base: give the model"):
        spectrum(adapter)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.weight.detach().double()
    lk.merge(model)
    after = layer.weight.detach().double()
    with pytest.raises(AnalysisError, match=r"merged into the weights: lk.unmerge"):
        spectrum(adapter, model=model)
    lk.unmerge(model)
    found = spectrum(adapter, model=model)["model.layers.0.self_attn.q_proj"]
    wanted = torch.linalg.svdvals(after - before)
    assert found.singular_values == pytest.approx(wanted.tolist(), abs=1e-5)


def test_whole_weights_are_compared_with_the_base():
    model = build("llama")
    lk.attach(model, lk.FullConfig(only_top=True, top=1))
    adapter = lk.extract(model)
    lk.detach(model)
    with pytest.raises(AnalysisError, match="top-k: it holds whole weights"):
        spectrum(adapter)
    path = "model.layers.1.mlp.up_proj"
    a, b = planted(48, 32, [2.0, 1.0], seed=3)
    adapter.tensors[f"{path}.weight"].add_((b @ a).float())
    found = spectrum(adapter, model=model)
    assert found[path].singular_values[:2] == pytest.approx([2, 1], abs=1e-5)
    assert found["model.layers.1.mlp.down_proj"].norm == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lk.PrefixConfig(), "virtual tokens are inputs of the blocks and change no weight"),
        (lk.BottleneckConfig(), "bottlenecks are layers of their own and change no weight"),
        (lk.BitFitConfig(add_missing=True), "it trains vectors"),
    ],
    ids=["prefix", "bottleneck", "bitfit"],
)
def test_a_method_without_low_rank_updates_says_why_nothing_is_shown(config, reason):
    model = build("llama")
    lk.attach(model, config)
    adapter = lk.extract(model)
    lk.detach(model)
    for base in (None, model):
        with pytest.raises(AnalysisError, match=reason):
            spectrum(adapter, model=base)


def test_what_is_wrong_is_told_at_once():
    adapter = adapter_of({"x": planted(4, 5, [1.0], seed=0), "y": planted(4, 5, [1.0], seed=2)})
    adapter.tensors["x.lora_a"][0, 0] = torch.nan
    adapter.tensors["y.lora_b"][0, 0] = torch.inf
    with pytest.raises(AnalysisError) as caught:
        spectrum(adapter)
    assert "x.lora_a  holds NaN or infinity in 1 of 5" in str(caught.value)
    assert "y.lora_b  holds NaN" in str(caught.value)
    with pytest.raises(AnalysisError) as caught:
        spectrum(adapter, model=torch.nn.ModuleDict({"x": torch.nn.Linear(6, 4)}))
    assert "x  is 4×5 in the adapter, 4×6 here" in str(caught.value)
    assert "y  is not a module of this model" in str(caught.value)
    with torch.device("meta"):
        empty = torch.nn.ModuleDict({"x": torch.nn.Linear(5, 4), "y": torch.nn.Linear(5, 4)})
    with pytest.raises(AnalysisError, match="y  its weight is not in memory"):
        spectrum(adapter, model=empty)
