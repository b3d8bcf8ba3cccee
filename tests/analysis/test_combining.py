"""Sums of adapters against the dense sum in float64, and in PEFT."""

from dataclasses import replace

import peft
import pytest
import torch
from torch import Tensor

import lorakit as lk
from adapter.peft_models import PEFTS_WARNINGS, make, output
from analysis.made import adapter_of, dense, in_float64, planted, random
from lorakit.adapter.folder_write import save_peft
from lorakit.analysis import combine
from lorakit.errors import AnalysisError
from references import attach_random
from tiny_models import build

FAMILIES = {
    "llama": ({"targets": "q,v,down"}, {"targets": "q,k,o", "layers": "1"}),
    "gpt2": ({"targets": "q,v"}, {"targets": "k,v,o", "use_rslora": True}),  # slices
    "gpt_neox": ({"targets": "q,v"}, {"targets": "query_key_value"}),  # slices beside the whole
    "convolutions": ({"targets": "image,grouped"}, {"targets": "grouped,point,time"}),
    "tables": ({"targets": "table,0"}, {"targets": "table,head"}),
}


def trained(family, number, **config):
    """An adapter of a family's model, with random tensors, and the model without it."""
    model = make(family)
    attach_random(model, seed=number, rank=2 + 3 * number, alpha=3 + number, **config)
    adapter = lk.extract(model)
    lk.detach(model)
    return adapter, model


def pair_of(family):
    first, second = FAMILIES[family]
    return trained(family, 0, **first)[0], *trained(family, 1, **second)


def dense_sum(adapters, weights):
    found: dict[str, Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, delta in dense(adapter).items():
            found[path] = found.get(path, torch.zeros_like(delta)) + weight * delta
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weighted_sum_is_the_dense_one(family):
    first, second, _ = pair_of(family)
    wanted = dense_sum((first, second), (0.7, -1.3))
    made = combine([in_float64(first), in_float64(second)], [0.7, -1.3])
    found = dense(made)
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert (found[path] - delta).norm() <= 1e-14 * delta.norm() * 10, path
    for site in made.sites:
        b, a = (made.tensors[f"{site.name}.lora_{x}"].flatten(1) for x in "ba")
        assert site.rank <= min(9, b.shape[0], a.shape[1])  # 5 and two slices of 2
    assert made.card["combined"]["relative_error"] < 1e-14


@PEFTS_WARNINGS
@pytest.mark.parametrize("family", FAMILIES)
def test_a_combination_and_its_peft_file_answer_as_the_dense_sum_does(family, tmp_path):
    first, second, model = pair_of(family)
    weights = (0.6, 0.4)
    made = combine([first, second], weights)
    lk.attach(model, made)
    ours = output(model, family)
    lk.detach(model)
    lk.attach(model, first, name="first")
    lk.attach(model, second, name="second")
    with lk.route(model, {"first": 0.6, "second": 0.4}):
        assert torch.allclose(output(model, family), ours, atol=1e-5)
    lk.detach(model)
    save_peft(made, tmp_path / "peft")
    assert torch.allclose(dense_of_peft(model, tmp_path / "peft", family), ours, atol=1e-5)


def dense_of_peft(model, folder, family):
    """What a model answers with an adapter in PEFT."""
    return output(peft.PeftModel.from_pretrained(model, folder).eval(), family)


def test_one_adapter_twice_has_its_own_rank_and_its_negative_undoes_it():
    made = adapter_of({"x": planted(12, 9, [3.0, 2.0], seed=0)})
    twice = combine([made, made], [1.0, 1.0])
    assert twice.sites[0].rank == 2
    assert torch.allclose(dense(twice)["x"], 2 * dense(made)["x"])
    nothing = combine([made, made], [1.0, -1.0])
    assert not dense(nothing)["x"].any()
    half = combine([made], [-0.5])
    assert torch.allclose(dense(half)["x"], -0.5 * dense(made)["x"])
    assert torch.allclose(dense(combine([made, half]))["x"], 0.25 * dense(made)["x"])


def test_the_rank_is_never_more_than_the_layers_smaller_side():
    pair = [adapter_of({"x": (random(4, 5, seed=n), random(30, 4, seed=n + 2))}) for n in (0, 1)]
    made = combine(pair, [1.0, 1.0])
    assert made.sites[0].rank == 5
    assert torch.allclose(dense(made)["x"], dense_sum(pair, (1.0, 1.0))["x"])


def test_what_a_smaller_rank_cuts_off_is_told():
    pair = [adapter_of({"x": (random(4, 20, seed=n), random(30, 4, seed=n + 2))}) for n in (0, 1)]
    made = combine(pair, [1.0, 0.5], rank=3)
    exact = dense_sum(pair, (1.0, 0.5))["x"]
    s = torch.linalg.svdvals(exact)
    assert made.sites[0].rank == 3
    assert (dense(made)["x"] - exact).norm().item() == pytest.approx(s[3:].norm().item())
    share = (s[3:].norm() / s.norm()).item()
    assert made.card["combined"]["relative_error"] == pytest.approx(share)


def test_disjoint_targets_are_the_union_and_load():
    first, model = trained("llama", 0, targets="q", layers="0")
    second, _ = trained("llama", 1, targets="v")
    made = combine([first, second], [2.0, 1.0])
    assert len(made.sites) == 3
    lk.attach(model, made)
    assert {site.rank for site in made.sites} == {2, 5}


def test_ties_keeps_the_entries_whose_sign_wins():
    rows = [[[4.0, -3.0, 0.1, 2.0]], [[2.0, 5.0, 0.2, -1.0]], [[0.3, -1.0, 6.0, 4.0]]]
    made = [
        adapter_of({"x": (torch.tensor(row).double(), torch.ones(1, 1).double())}) for row in rows
    ]
    # Of each the two largest: [4 -3 . .], [2 5 . .], [. . 6 4]; signs of the sums + + + +.
    merged = combine(made, [1.0, 1.0, 1.0], method="ties", density=0.5)
    assert dense(merged)["x"].tolist()[0] == pytest.approx([3, 5, 6, 4])


def test_dare_drops_a_share_and_keeps_the_sum_on_average():
    made = adapter_of({"x": (torch.ones(1, 300).double(), torch.ones(200, 1).double())})
    merged = combine([made], [2.0], method="dare", density=0.25, seed=1, rank=200)
    entries = dense(merged)["x"]
    assert merged.card["combined"]["relative_error"] < 1e-6
    values = {round(v, 4) for v in entries.flatten().tolist()}
    assert {abs(v) for v in values} == {0, 8}
    assert entries.mean().item() == pytest.approx(2, rel=0.05)
    again = combine([made], [2.0], method="dare", density=0.25, seed=1, rank=200)
    assert again.content_hash() == merged.content_hash()
    other = combine([made], [2.0], method="dare", density=0.25, seed=2, rank=200)
    assert other.content_hash() != merged.content_hash()


def test_heads_and_biases_are_averaged_where_that_is_defined():
    model = build("bert")
    pair = []
    for seed in (0, 1):
        attach_random(model, seed=seed, rank=2, bias="all", modules_to_save="classifier")
        pair.append(replace(lk.extract(model), card={"labels": ["a", "b", "c"], "task": "x"}))
        lk.detach(model)
    made = combine(pair, [0.25, 0.75])
    for name in ("classifier.weight", "bert.encoder.layer.0.attention.self.query.bias"):
        wanted = 0.25 * pair[0].tensors[name] + 0.75 * pair[1].tensors[name]
        assert torch.allclose(made.tensors[name], wanted)
    assert made.card["labels"] == ["a", "b", "c"]
    lk.attach(model, made)
    lk.detach(model)
    attach_random(model, rank=2)
    plain = lk.extract(model)
    with pytest.raises(AnalysisError) as caught:
        combine(
            [pair[0], plain, replace(pair[1], card={"labels": ["a", "b", "d"]})], [1.0, 1.0, 1.0]
        )
    said = str(caught.value)
    assert "self.query.bias  it replaces the base's" in said
    assert "adapter 2 does not" in said
    assert "the weights sum to 1, and they sum to 3" in said
    assert "of other classes: a, b, c; unknown; a, b, d" in said


def test_what_cannot_be_combined_is_told_at_once():
    model = build("llama")
    attach_random(model, rank=2, targets="q", use_dora=True)
    dora = lk.extract(model)
    lk.detach(model)
    lk.attach(model, [lk.LoRAConfig(rank=2), lk.PrefixConfig()])
    mixed = lk.extract(model)
    lk.detach(model)
    lk.attach(model, lk.BottleneckConfig())
    bottleneck = lk.extract(model)
    with pytest.raises(AnalysisError) as caught:
        combine([dora, mixed, bottleneck], [1.0, float("nan")], rank=0, density=2.0)
    said = str(caught.value)
    for part in (
        "3 adapters have 2 weights",
        "the weight nan is no finite number",
        "rank is 1 at least, found 0",
        "density is a share above 0 and up to 1, found 2.0",
        "adapter 1  DoRA's ΔW",
        "adapter 2  has prefix-embedding beside LoRA, which has no weighted sum",
        "adapter 3  adapter-h: bottlenecks are layers of their own",
    ):
        assert part in said
    with pytest.raises(AnalysisError, match="nothing to combine"):
        combine([])


def test_adapters_of_other_shapes_or_bases_are_refused():
    one = adapter_of({"x": planted(4, 5, [1.0], seed=0)})
    other = adapter_of({"x": planted(4, 6, [1.0], seed=0)})
    with pytest.raises(AnalysisError, match="x  is another slice or kernel in adapter 2"):
        combine([one, other])
    taller = adapter_of({"x": planted(7, 5, [1.0], seed=0)})
    with pytest.raises(AnalysisError, match="x  4×5 in adapter 1, 7×5 in adapter 2"):
        combine([one, taller])
    pair = []
    for seed in (0, 1):
        model = build("llama", seed=seed)
        attach_random(model, rank=2, targets="q")
        pair.append(lk.extract(model))
    with pytest.raises(AnalysisError, match="different bases"):
        combine(pair)
    assert combine(pair, allow_other_base=True).sites
