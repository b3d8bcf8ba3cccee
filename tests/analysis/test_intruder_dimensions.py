"""Intruder dimensions that are planted, in an adapter and in a fine-tuned model."""

import copy

import pytest
import torch
from torch import nn

from analysis.made import adapter_of, orthonormal
from lorakit.analysis import intruders, svd
from lorakit.errors import AnalysisError

VALUES = torch.tensor([10.0, 8.0, 6.0, 4.0, 2.0], dtype=torch.float64)


def parts():
    u, v = orthonormal(40, 8, seed=0), orthonormal(30, 8, seed=1)
    model = nn.Module()
    model.x = nn.Linear(30, 40, bias=False, dtype=torch.float64)
    model.x.weight.data.copy_((u[:, :5] * VALUES) @ v[:, :5].T)
    return model, u, v


def outside(u, v):
    """An update along a direction that W's singular vectors share evenly, and one along W's own."""
    mixed = (u[:, :5].sum(1) / 5**0.5)[:, None]
    return adapter_of({"x": (v[:, 5:6].T.contiguous(), 50 * mixed)})


def test_a_direction_unlike_all_of_the_weights_is_an_intruder():
    model, u, v = parts()
    found = intruders(outside(u, v), model, top=3)["x"]
    assert found.compared_with == 30
    assert found.svd == "exact"
    assert found.cosines[0] < 0.5 < found.cosines[1]
    assert found.count == 1
    assert intruders(outside(u, v), model, top=3, threshold=0.3)["x"].count == 0


def test_growing_a_direction_of_the_weight_adds_none():
    model, u, v = parts()
    same = adapter_of({"x": (v[:, 2:3].T.contiguous(), 50 * u[:, 2:3])})
    found = intruders(same, model, top=4)["x"]
    assert found.count == 0
    assert min(found.cosines) == pytest.approx(1)


def test_a_model_fine_tuned_in_full_is_compared_likewise(monkeypatch):
    model, u, v = parts()
    tuned = copy.deepcopy(model)
    adapter = outside(u, v)
    with torch.no_grad():
        tuned.x.weight += adapter.tensors["x.lora_b"] @ adapter.tensors["x.lora_a"]
    exact = intruders(adapter, model, top=3)["x"]
    found = intruders(tuned, model, top=3, targets=["x"])["x"]
    assert found.cosines == pytest.approx(exact.cosines)
    monkeypatch.setattr(svd, "EXACT_UP_TO", 8)
    randomised = intruders(tuned, model, top=3, targets=["x"])["x"]
    assert randomised.svd == "randomised"
    assert randomised.cosines == pytest.approx(exact.cosines, abs=1e-3)


def test_what_cannot_be_asked_is_told():
    model, u, v = parts()
    with pytest.raises(AnalysisError, match="top is 1 at least"):
        intruders(outside(u, v), model, top=0)
