"""LoRA on experts that are Linear modules, and on the routers beside them (Switch, NLLB-MoE)."""

import copy

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.models.routers import routers
from mixtures import mixture
from references import attach_random, base_hash, outputs
from token_experts import FAMILIES, inputs, made

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROUTER_OF = {"switch": "layer.1.mlp.router.classifier", "nllb-moe": "ffn.router.classifier"}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_has_the_experts_and_says_that_it_leaves_the_routers_out(family):
    model = made(family)
    found = lk.plan(model, lk.LoRAConfig(targets="all-linear"))
    paths = [site.path for site in found.sites]
    assert any(".experts.expert_1." in path for path in paths)
    assert not any("router" in path for path in paths)
    told = [line for line in str(found).splitlines() if "leaves a router out" in line]
    assert len(told) == 2
    assert ROUTER_OF[family] in told[0].replace("*", "1")
    # One line for all experts.
    assert str(found).count("experts.expert_*") == 4
    named = lk.plan(model, lk.LoRAConfig(targets=["all-linear", "router.classifier"]))
    assert len(named.sites) == len(paths) + 2
    assert "leaves" not in str(named)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_have_roles(family):
    model = made(family)
    up = lk.plan(model, lk.LoRAConfig(targets="experts.up")).sites
    both = lk.plan(model, lk.LoRAConfig(targets="experts")).sites
    assert len(both) == 2 * len(up)
    assert all(".experts.expert_" in site.path for site in both)
    with pytest.raises(lk.LorakitError, match=r"no layer called 'experts\.gate'"):
        lk.plan(model, lk.LoRAConfig(targets="experts.gate"))


def test_a_router_is_told_by_what_is_beside_it():
    block = nn.Module()
    block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    block.gate, block.shared = nn.Linear(8, 3), nn.Linear(8, 8)
    model = nn.Sequential(nn.Linear(8, 8), block)
    assert routers(model) == ("1.gate",)
    # Those of a kind of their own are told by that.
    assert routers(mixture("mixtral")) == tuple(f"model.layers.{n}.mlp.gate" for n in (0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_unmerged(family):
    model, batch = made(family), inputs(2)
    bits = base_hash(model)
    attach_random(model, targets="experts", rank=2)
    before = outputs(model, batch)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, batch), before, rtol=1e-4, atol=1e-4)
    lk.unmerge(model)
    assert torch.equal(outputs(model, batch), before)
    lk.detach(model)
    assert base_hash(model) == bits


@pytest.mark.parametrize("family", FAMILIES)
def test_files_both_ways_with_peft(family, tmp_path):
    base, batch = made(family, torch.float32), inputs(2)
    ours = copy.deepcopy(base)
    attach_random(ours, targets="all-linear", rank=2)
    lk.extract(ours).save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(theirs, batch), outputs(ours, batch), rtol=1e-4, atol=1e-4)
    # PEFT's all-linear has the routers too, and its files are read with them.
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    found = lk.attach(ours, tmp_path / "theirs")
    assert any("router" in site.path for site in found.sites)
    torch.testing.assert_close(outputs(ours, batch), outputs(theirs, batch), rtol=1e-4, atol=1e-4)
