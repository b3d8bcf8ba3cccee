"""The adapter nearest to what full fine-tuning changed, with what it leaves out."""

import copy

import pytest
import torch

import lorakit as lk
from analysis.made import dense, planted
from lorakit.analysis import from_checkpoint
from lorakit.errors import AnalysisError, TargetError
from references import outputs
from tiny_models import build, example_inputs

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def tuned_pair():
    """A base, and the same with changes of rank 2 and 3 in two layers."""
    model = build("llama").double()
    tuned = copy.deepcopy(model)
    for path, values, seed in ((Q, [2.0, 1.0], 0), (UP, [3.0, 2.0, 1.0], 2)):
        weight = tuned.get_submodule(path).weight
        a, b = planted(weight.shape[0], weight.shape[1], values, seed=seed)
        with torch.no_grad():
            weight += b @ a
    return model, tuned


def test_a_difference_of_low_rank_is_found_whole():
    model, tuned = tuned_pair()
    adapter = from_checkpoint(model, tuned, energy=1 - 1e-9)
    ranks = {site.path: site.rank for site in adapter.sites}
    assert (ranks[Q], ranks[UP], set(ranks.values())) == (2, 3, {1, 2, 3})
    told = adapter.card["from_checkpoint"]
    assert told["energy_lost"] < 1e-12
    assert told["left_out"] == []
    inputs = example_inputs(model)
    lk.attach(model, adapter)
    assert torch.allclose(outputs(model, inputs), outputs(tuned, inputs), atol=1e-5)


def test_a_smaller_rank_loses_the_energy_that_it_says():
    model, tuned = tuned_pair()
    adapter = from_checkpoint(model, tuned, rank=1, targets=["q", "up"])
    told = adapter.card["from_checkpoint"]
    assert {site.rank for site in adapter.sites} == {1}
    assert told["energy_lost"] == pytest.approx((1 + 4 + 1) / (5 + 14), rel=1e-5)
    assert dense(adapter)[Q].norm().item() == pytest.approx(2, rel=1e-6)


def test_what_was_tuned_elsewhere_is_named():
    model, tuned = tuned_pair()
    with torch.no_grad():
        tuned.model.norm.weight += 0.5
    adapter = from_checkpoint(model, tuned, rank=3, targets=["q"])
    told = adapter.card["from_checkpoint"]
    assert told["left_out"] == [f"{UP}.weight", "model.norm.weight"]
    assert told["share_left_out"] == pytest.approx((14 + 8) / (5 + 14 + 8), rel=1e-6)


def test_slices_of_a_fused_layer_leave_the_other_slices_out(tmp_path):
    model = build("gpt2").double()
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.transformer.h[0].attn.c_attn.weight += 0.1
    adapter = from_checkpoint(model, tuned, rank=1, targets=["q", "v"])
    told = adapter.card["from_checkpoint"]
    assert told["left_out"] == ["transformer.h.0.attn.c_attn.weight"]
    assert told["share_left_out"] == pytest.approx(1 / 3, rel=1e-6)
    again = lk.Adapter.load(adapter.save(tmp_path / "x"))
    lk.attach(model, again)


def test_what_does_not_fit_is_told():
    model, tuned = tuned_pair()
    with pytest.raises(AnalysisError, match="one of the two"):
        from_checkpoint(model, tuned)
    with pytest.raises(TargetError):
        from_checkpoint(model, tuned, rank=1, targets=["queue"])
    other = build("llama", intermediate_size=40)
    with pytest.raises(AnalysisError) as caught:
        from_checkpoint(model, other, rank=1, targets=["up"])
    assert f"{UP}.weight  is (48, 32) in the base, (40, 32) in the fine-tuned" in str(caught.value)
    with pytest.raises(AnalysisError, match="is not in the fine-tuned model"):
        from_checkpoint(model, build("gpt2"), rank=1, targets=["up"])
