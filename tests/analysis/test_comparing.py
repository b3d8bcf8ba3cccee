"""Two adapters side by side, against their dense products."""

import json

import pytest
import torch

import lorakit as lk
from analysis.made import adapter_of, dense, planted, random
from lorakit.analysis import compare
from lorakit.errors import AnalysisError
from references import attach_random
from tiny_models import build


def pair():
    shared = [(random(3, 20, seed=n), random(15, 3, seed=n + 5)) for n in (0, 1)]
    alone = planted(6, 7, [2.0], seed=9)
    one = adapter_of({"x": shared[0], "y": shared[1], "z": alone}, alpha=6.0)
    other = adapter_of({"x": shared[1], "y": shared[1]}, alpha=3.0)
    return one, other


def test_cosine_and_difference_are_those_of_the_dense_products():
    one, other = pair()
    found = compare(one, other)
    first, second = dense(one), dense(other)
    assert list(found.sites) == ["x", "y"]
    for name, site in found.sites.items():
        cosine = (first[name] * second[name]).sum() / first[name].norm() / second[name].norm()
        difference = (first[name] - second[name]).norm() / first[name].norm()
        assert site.cosine == pytest.approx(cosine.item(), abs=1e-12)
        assert site.relative_difference == pytest.approx(difference.item(), rel=1e-12)
    assert found.sites["y"].cosine == pytest.approx(1)
    assert found.sites["y"].relative_difference == pytest.approx(0.5)
    assert found.only_first == {"z": pytest.approx(12)}
    assert found.only_second == {}


def test_the_whole_counts_what_one_leaves_alone():
    one, other = pair()
    found = compare(one, other)
    first = torch.cat([d.flatten() for d in dense(one).values()])
    second = torch.cat([*(d.flatten() for d in dense(other).values()), torch.zeros(42)])
    cosine = first @ second / first.norm() / second.norm()
    assert found.cosine == pytest.approx(cosine.item(), abs=1e-12)
    wanted = (first - second).norm() / first.norm()
    assert found.relative_difference == pytest.approx(wanted.item(), rel=1e-12)
    assert json.loads(json.dumps(found.to_json()))["sites"]["x"]["similarity_a"][0][0] <= 1


def test_an_untrained_adapter_has_no_cosine():
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=2, targets="q"))
    fresh = lk.extract(model)
    lk.detach(model)
    attach_random(model, rank=3, targets="q", use_dora=True)
    found = compare(fresh, lk.extract(model))
    site = next(iter(found.sites.values()))
    assert (site.cosine, site.relative_difference, found.cosine) == (None, None, None)
    assert site.similarity_b.shape == (0, 3)
    assert found.without_magnitudes
    lk.detach(model)
    lk.attach(model, lk.PrefixConfig())
    prefix = lk.extract(model)
    with pytest.raises(AnalysisError, match="comparing needs ΔW"):
        compare(fresh, prefix)
