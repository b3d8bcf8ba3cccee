"""Amplification of directions that are planted in a weight, against Table 7's formulas."""

import math

import pytest
import torch
from torch import nn

import lorakit as lk
from analysis.made import adapter_of, orthonormal, planted, random
from lorakit.analysis import amplification, svd
from lorakit.errors import AnalysisError
from references import attach_random
from tiny_models import build


def base_with(weight):
    model = nn.Module()
    model.x = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    model.x.weight.data.copy_(weight)
    return model


def planted_pair(*, inside, top):
    """W with some singular values, and ΔW along directions of W whose values are `inside`.

    The adapter's singular values are 3 and 4, so that ‖ΔW‖ is 5.
    """
    values = torch.tensor([*top, *inside, *[0.01] * 10], dtype=torch.float64)
    u, v = orthonormal(40, len(values), seed=0), orthonormal(30, len(values), seed=1)
    chosen = slice(len(top), len(top) + len(inside))
    sizes = torch.tensor([4.0, 3.0], dtype=torch.float64)
    factors = v[:, chosen].T.contiguous(), u[:, chosen] * sizes
    return base_with((u * values) @ v.T), adapter_of({"x": factors})


def test_a_planted_direction_is_amplified_by_the_known_factor():
    model, adapter = planted_pair(inside=[0.3, 0.4], top=[20.0, 15.0])
    found = amplification(adapter, model)["x"]
    assert found.rank == 2
    assert found.delta_norm == pytest.approx(5)
    assert found.in_delta == pytest.approx(0.5)
    assert found.factor == pytest.approx(10)
    assert found.in_weight == pytest.approx(25)
    assert found.weight_norm == pytest.approx(model.x.weight.norm().item())
    assert found.svd == "exact"
    assert found.in_random < 0.2 * found.in_weight


def test_directions_that_the_weight_lacks_have_no_factor():
    model, adapter = planted_pair(inside=[0.0, 0.0], top=[1.0])
    assert amplification(adapter, model)["x"].in_delta == pytest.approx(0, abs=1e-12)
    zero = adapter_of({"x": (random(2, 30, seed=0), torch.zeros(40, 2).double())})
    found = amplification(zero, model)["x"]
    assert (found.rank, found.in_delta, found.factor) == (0, 0, None)


def test_fewer_directions_are_the_leading_ones():
    model, adapter = planted_pair(inside=[0.3, 0.4], top=[20.0])
    found = amplification(adapter, model, rank=1)["x"]
    assert (found.rank, found.in_delta) == (1, pytest.approx(0.3))
    assert found.delta_norm == pytest.approx(5)


def test_random_directions_hold_what_draws_hold_on_average():
    model, adapter = planted_pair(inside=[0.3, 0.4], top=[20.0])
    found = amplification(adapter, model)["x"]
    weight = model.x.weight.detach()
    draws = (
        (orthonormal(40, 2, seed=s).T @ weight @ orthonormal(30, 2, seed=1000 + s)).norm() ** 2
        for s in range(400)
    )
    assert found.in_random == pytest.approx(math.sqrt(sum(draws) / 400), rel=0.1)


def test_a_large_weight_has_its_leading_directions_from_a_randomised_decomposition(monkeypatch):
    model, adapter = planted_pair(inside=[0.3, 0.4], top=[20.0, 15.0, 9.0])
    exact = amplification(adapter, model)["x"]
    monkeypatch.setattr(svd, "EXACT_UP_TO", 8)
    found = amplification(adapter, model)["x"]
    assert found.svd == "randomised"
    assert found.in_weight == pytest.approx(exact.in_weight, rel=1e-4)
    assert found.in_delta == pytest.approx(exact.in_delta, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_slices_and_attached_models_give_each_site_its_own_weight(family):
    model = build(family)
    attach_random(model, rank=2, targets="q,v,down")
    adapter = lk.extract(model)
    found = amplification(adapter, model)
    assert list(found) == [site.name for site in adapter.sites]
    lk.detach(model)
    assert found == amplification(adapter, model)
    site = adapter.sites[0]
    weight = model.get_submodule(site.path).weight.detach().double()
    weight = weight.T[: site.rows[0][1]] if family == "gpt2" else weight
    a, b = (adapter.tensors[f"{site.name}.lora_{x}"].double() for x in "ab")
    u, _, vh = torch.linalg.svd(b @ a)
    wanted = (u[:, :2].T @ weight @ vh[:2].T).norm().item()
    assert found[site.name].in_delta == pytest.approx(wanted, rel=1e-6)


def test_a_base_that_is_not_there_is_told():
    adapter = adapter_of({"x": planted(40, 30, [1.0], seed=0)})
    with torch.device("meta"):
        empty = nn.ModuleDict({"x": nn.Linear(30, 40)})
    with pytest.raises(AnalysisError, match="x  its weight is not in memory"):
        amplification(adapter, empty)
    first, second = build("llama"), build("llama", seed=1)
    attach_random(first, rank=2, targets="q")
    adapter = lk.extract(first)
    with pytest.raises(AnalysisError, match="trained on another base"):
        amplification(adapter, second)
    assert amplification(adapter, second, allow_other_base=True)
