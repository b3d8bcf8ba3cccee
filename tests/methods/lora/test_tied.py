"""`ensure_weight_tying`: layers of one weight have one A and B, or one full copy."""

import copy
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AdapterFileError, ConfigError, TargetError
from references import alone, outputs, randomise
from tiny_models import build, example_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

EMBED, HEAD = "model.embed_tokens", "lm_head"
TIED = {"rank": 2, "alpha": 6, "ensure_weight_tying": True}


def base(family="llama"):
    return build(family, tie_word_embeddings=True)


def adapted(model, **config):
    """A copy of a model with a random adapter that trains."""
    model = copy.deepcopy(model)
    lk.attach(model, lk.LoRAConfig(**{"targets": ["q", "embed"], **TIED, **config}))
    randomise(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("word", ["embed", "head"])
def test_both_ends_have_the_change_of_one_weight(family, word):
    original = base(family)
    inputs = example_inputs(original, rows=2)
    model = adapted(original, targets=word)
    adapter = lk.extract(model)
    plain = copy.deepcopy(original)
    weight = plain.get_input_embeddings().weight
    assert plain.get_output_embeddings().weight is weight
    owner = next(site for site in adapter.sites if site.tied_to is None)
    a, b = (adapter.tensors[f"{owner.name}.lora_{end}"] for end in "ab")
    with torch.no_grad():
        weight += owner.scale * (b @ a).T
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs), rtol=0, atol=1e-5)
    # What is trained counts once; files have both ends.
    trained = sum(p.numel() for _, p in adapter_parameters(model, "default"))
    assert trained == a.numel() + b.numel() == adapter.parameters
    assert len(adapter.tensors) == 4


def test_a_step_moves_both_ends_by_one_gradient():
    model = adapted(base()).train()
    inputs = example_inputs(model, rows=2)
    parameters = dict(adapter_parameters(model, "default"))
    twin = adapted(base(), ensure_weight_tying=False, targets=["q", "embed", "head"]).train()
    own = dict(adapter_parameters(twin, "default"))
    with torch.no_grad():
        tensors = lk.extract(model).tensors
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    for each in (model, twin):
        each(**inputs).logits.square().sum().backward()
    # Apart, each end has its part of the gradient.
    for end, other in (("a", "b"), ("b", "a")):
        apart = own[f"{EMBED}.lora_{end}"].grad + own[f"{HEAD}.lora_{other}"].grad.T
        torch.testing.assert_close(
            parameters[f"{EMBED}.lora_{end}"].grad, apart, rtol=1e-4, atol=1e-3
        )
    torch.optim.AdamW(parameters.values(), lr=0.1).step()
    tensors = lk.extract(model).tensors
    assert torch.equal(tensors[f"{HEAD}.lora_a"], tensors[f"{EMBED}.lora_b"].T)
    assert torch.equal(tensors[f"{HEAD}.lora_b"], tensors[f"{EMBED}.lora_a"].T)


def test_merged_it_is_one_weight_still():
    model = adapted(base())
    inputs = example_inputs(model, rows=2)
    before = outputs(model, inputs)
    lk.merge(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-5)
    lk.unmerge(model)
    assert torch.equal(outputs(model, inputs), before)


def test_rows_have_their_own():
    model = base()
    for name in ("a", "b"):
        lk.attach(model, lk.LoRAConfig(targets="embed", **TIED), name=name)
        randomise(model, name, seed=ord(name))
    inputs, names = example_inputs(model, rows=3), ["a", None, "b"]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for mine, wanted in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"targets": "q", "modules_to_save": ["embed_tokens"]}])
def test_folders_hold_it_for_lorakit_and_for_peft(settings, tmp_path):
    model = adapted(base(), **settings)
    inputs = example_inputs(model, rows=2)
    wanted = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "ours")
    again = copy.deepcopy(base())
    lk.attach(again, tmp_path / "ours", trainable=True)
    assert torch.equal(outputs(again, inputs), wanted)
    shapes = [{n: p.shape for n, p in adapter_parameters(m, "default")} for m in (model, again)]
    assert shapes[0] == shapes[1]
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", is_trainable=True).eval()
    torch.testing.assert_close(outputs(theirs, inputs), wanted, rtol=0, atol=1e-5)
    config: Any = theirs.peft_config["default"]
    assert config.ensure_weight_tying
    assert HEAD in (config.target_modules_to_tie or config.modules_to_tie)


def test_a_folder_of_peft_trains_on_as_one(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    theirs = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(str(tmp_path / "peft"))
    adapter = lk.Adapter.load(tmp_path / "peft")
    assert {site.path: site.tied_to for site in adapter.sites} == {HEAD: EMBED, EMBED: None}
    model = base()
    lk.attach(model, adapter, trainable=True)
    assert [n for n, _ in adapter_parameters(model, "default")] == [
        f"{EMBED}.lora_a",
        f"{EMBED}.lora_b",
    ]
    inputs = example_inputs(model, rows=2)
    expected = outputs(theirs.eval(), inputs)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.thorough
def test_the_stacks_of_an_encoder_decoder_and_its_head_have_one():
    original = base("t5")
    model = adapted(original, targets="embed")
    sites = lk.extract(model).sites
    owner = "encoder.embed_tokens"
    assert {site.path: site.tied_to for site in sites} == {
        owner: None,
        "decoder.embed_tokens": owner,
        HEAD: owner,
    }
    inputs = example_inputs(model, rows=2)
    before = outputs(model, inputs)
    lk.merge(model)
    assert original.get_output_embeddings().weight is original.shared.weight
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-5)


def test_one_copy_serves_both_ends():
    model = base()
    config = lk.LoRAConfig(targets="q", modules_to_save=["lm_head"], ensure_weight_tying=True)
    plan = lk.attach(model, config)
    assert set(plan.copies) == {EMBED, HEAD}
    weight = model.get_input_embeddings().weight
    assert plan.parameters == sum(s.rank * 2 * 32 for s in plan.sites) + weight.numel()
    names = [name for name, _ in adapter_parameters(model, "default") if "weight" in name]
    assert len(names) == 1
    randomise(model)
    tensors = lk.extract(model).tensors
    assert torch.equal(tensors[f"{EMBED}.weight"], tensors[f"{HEAD}.weight"])


@pytest.mark.parametrize(
    ("tied", "config", "told"),
    [
        (False, {"targets": "embed"}, "neither a target nor a full copy has a weight that another"),
        (True, {"targets": "q"}, "neither a target nor a full copy"),
        (True, {"targets": "embed", "exclude": "head"}, "exclude names lm_head"),
        (
            True,
            {"targets": ["embed", "head"], "rank_pattern": {"head": 4}},
            "rank_pattern gives lm_head 4, and not so model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be_tied_is_told(tied, config, told):
    model = build("llama", tie_word_embeddings=tied)
    with pytest.raises(TargetError, match=told):
        lk.attach(model, lk.LoRAConfig(**{**TIED, **config}))


@pytest.mark.parametrize("other", [{"use_dora": True}, {"init": "pissa"}])
def test_forms_that_cannot_be_tied_are_told(other):
    with pytest.raises(ConfigError, match="ensure_weight_tying can't be combined with"):
        lk.LoRAConfig(targets="embed", **TIED, **other)


def test_values_that_came_apart_are_told():
    adapter = lk.extract(adapted(base()))
    name = f"{HEAD}.lora_a"
    spoilt = replace(adapter, tensors={**adapter.tensors, name: adapter.tensors[name] + 1})
    with pytest.raises(AdapterFileError, match=r"lm_head  is tied to model\.embed_tokens, and"):
        lk.attach(base(), spoilt)


@pytest.mark.thorough
def test_a_sum_of_tied_adapters_has_updates_of_its_own_at_each_end():
    original = base()
    adapters = []
    for seed in (1, 2):
        model = copy.deepcopy(original)
        lk.attach(model, lk.LoRAConfig(targets="embed", **TIED))
        randomise(model, seed=seed)
        adapters.append(lk.extract(model))
    both = lk.analysis.combine(adapters, [0.5, 2.0])
    assert all(site.tied_to is None for site in both.sites)
    model, mixed = copy.deepcopy(original), copy.deepcopy(original)
    lk.attach(model, both)
    for name, adapter in zip("ab", adapters, strict=True):
        lk.attach(mixed, adapter, name=name)
    inputs = example_inputs(original, rows=2)
    with lk.route(mixed, {"a": 0.5, "b": 2.0}):
        wanted = outputs(mixed, inputs)
    torch.testing.assert_close(outputs(model, inputs), wanted, rtol=0, atol=1e-4)
