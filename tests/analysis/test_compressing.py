"""Compressed adapters: the rank that is planted under noise is found, and PEFT loads the file."""

import json
from dataclasses import replace

import peft
import pytest
import torch

import lorakit as lk
from adapter.peft_models import PEFTS_WARNINGS
from analysis.made import adapter_of, dense, in_float64, orthonormal, planted, random
from lorakit.analysis import compress, spectrum
from lorakit.errors import AnalysisError
from references import attach_random, outputs
from tiny_models import build, example_inputs


def noisy(d_out, d_in, values, *, rank, noise, seed):
    """A and B of a rank whose product is that of some singular values, plus noise of full rank."""
    a, b = planted(d_out, d_in, [*values, *[noise] * (rank - len(values))], seed=seed)
    mixed = orthonormal(rank, rank, seed=seed)
    return mixed @ a, b @ mixed.T


def test_a_planted_rank_is_found_under_noise():
    ranks = {"one": [5.0], "three": [4.0, 3.0, 2.0], "all": [1.0] * 8}
    made = adapter_of(
        {
            name: noisy(40, 30, values, rank=8, noise=0.05, seed=n)
            for n, (name, values) in enumerate(ranks.items())
        }
    )
    smaller = compress(made, energy=0.99)
    assert [site.rank for site in smaller.sites] == [1, 3, 8]
    assert [each.rank_for(0.99) for each in spectrum(made).values()] == [1, 3, 8]


def test_the_result_is_the_best_of_its_rank_and_its_error_is_told():
    made = adapter_of({"x": (random(6, 20, seed=0), random(15, 6, seed=1))}, alpha=3.0)
    smaller = compress(made, rank=2)
    exact, found = dense(made)["x"], dense(smaller)["x"]
    s = torch.linalg.svdvals(exact)
    assert (found - exact).norm().item() == pytest.approx(s[2:].norm().item(), rel=1e-12)
    told = smaller.card["compressed"]
    assert told["relative_error"] == pytest.approx((s[2:].norm() / s.norm()).item(), rel=1e-12)
    assert told["rank"] == 2
    assert told["made_from"] == made.content_hash()


def test_all_energy_keeps_the_change_and_drops_the_ranks_it_does_not_use():
    a, b = random(4, 12, seed=0), random(9, 4, seed=1)
    twice = torch.cat([a, 2 * a]), torch.cat([b, b], dim=1)
    made = adapter_of({"twice": twice, "fresh": (a, torch.zeros_like(b))})
    smaller = compress(made, energy=1.0)
    assert [site.rank for site in smaller.sites] == [4, 1]
    assert torch.allclose(dense(smaller)["twice"], dense(made)["twice"], atol=1e-13)
    assert not dense(smaller)["fresh"].any()


@PEFTS_WARNINGS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_uneven_ranks_are_saved_and_load_in_lorakit_and_peft(family, tmp_path):
    model = build(family)
    attach_random(model, rank=4, alpha=9, use_rslora=True, targets="q,v,down")
    adapter = lk.extract(model)
    lk.detach(model)
    for number, site in enumerate(adapter.sites):  # so that the sites need other ranks
        adapter.tensors[f"{site.name}.lora_b"][:, 1 + number**2 % 4 :] *= 1e-3
    smaller = compress(adapter, energy=0.999)
    assert len({site.rank for site in smaller.sites}) > 1
    smaller.save(tmp_path / "small")
    again = lk.Adapter.load(tmp_path / "small")
    assert again.content_hash() == smaller.content_hash()
    inputs = example_inputs(model)
    lk.attach(model, again)
    ours = outputs(model, inputs)
    lk.detach(model)
    lk.attach(model, adapter)
    assert torch.allclose(ours, outputs(model, inputs), atol=0.05)
    lk.detach(model)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "small")
    assert torch.allclose(outputs(wrapped, inputs), ours, atol=1e-5)


def test_what_stands_beside_lora_stays_and_the_scores_are_no_longer_its():
    model = build("bert")
    lk.attach(model, [lk.LoRAConfig(rank=3, bias="all", modules_to_save="classifier")])
    adapter = replace(lk.extract(model), card={"step": 3, "scores": {"loss": 1.0}})
    lk.detach(model)
    smaller = compress(adapter, rank=1)
    assert smaller.copied_modules == adapter.copied_modules == ("classifier",)
    others = [name for name in adapter.tensors if ".lora_" not in name]
    assert all(torch.equal(smaller.tensors[n], adapter.tensors[n]) for n in others)
    assert smaller.card["compressed"]["scores_before"] == {"loss": 1.0}
    assert "scores" not in smaller.card
    lk.attach(model, smaller)  # every tensor has its place


def test_pissas_frozen_factors_become_part_of_the_change():
    model = build("llama")
    attach_random(model, rank=2, init="pissa", targets="q")
    adapter = lk.extract(model)
    smaller = compress(in_float64(adapter), energy=1.0)
    assert {site.frozen for site in smaller.sites} == {0}
    assert all(torch.allclose(dense(smaller)[n], d) for n, d in dense(adapter).items())


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "one of the two"),
        ({"energy": 0.9, "rank": 2}, "one of the two"),
        ({"energy": 0.0}, "above 0 and up to 1"),
        ({"energy": 1.5}, "above 0 and up to 1"),
        ({"rank": 0}, "rank is 1 at least"),
    ],
)
def test_what_cannot_be_asked_is_told(asked, told):
    with pytest.raises(AnalysisError, match=told):
        compress(adapter_of({"x": planted(4, 5, [1.0], seed=0)}), **asked)
