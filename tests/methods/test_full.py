"""Full fine-tuning and that of the last blocks: what is copied, what stays tied, what is told."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AdapterFileError, TargetError
from lorakit.merging.merge import finalize
from references import base_hash, outputs, randomise
from tiny_models import FAMILIES, build, example_inputs

TIED = ("llama", "gpt2", "opt")
TOP = lk.FullConfig(only_top=True, top=1)


def tied_model(family="llama"):
    return build(family, tie_word_embeddings=True)


def trained(model):
    return dict(adapter_parameters(model, "default"))


@sampled("family", FAMILIES)
def test_full_covers_every_parameter_of_every_family_and_starts_at_the_base(family):
    model = build(family)
    inputs = example_inputs(model)
    before, total = outputs(model, inputs), sum(p.numel() for p in model.parameters())
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = lk.attach(model, lk.FullConfig())
    assert plan.parameters == total
    assert trained(model).keys() == base.keys()
    assert all(torch.equal(p, base[name]) for name, p in trained(model).items())
    assert torch.equal(outputs(model, inputs), before)
    model(**inputs).logits.square().sum().backward()
    dead = [n for n, p in trained(model).items() if p.grad is None or not p.grad.any()]
    assert dead == []


@sampled("family", FAMILIES)
def test_full_computes_what_the_model_with_these_weights_does(family):
    model = build(family)
    lk.attach(model, lk.FullConfig())
    randomise(model)
    weights = {name: p.detach().clone() for name, p in trained(model).items()}
    plain = build(family)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    inputs = example_inputs(model)
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs))


@pytest.mark.parametrize("family", TIED)
def test_tied_weights_are_one_parameter_also_after_a_step_and_in_the_file(family, tmp_path):
    model = tied_model(family)
    lk.attach(model, lk.FullConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**example_inputs(model)).logits.square().mean().backward()
    optimizer.step()
    embedding = model.get_input_embeddings().adapter_bank["@default"].copy.weight
    assert model.get_output_embeddings().adapter_bank["@default"].copy.weight is embedding
    assert not torch.equal(embedding, model.get_input_embeddings().weight)
    saved = lk.extract(model)
    assert not any(name.startswith("lm_head") for name in saved.tensors)
    lk.detach(model)
    lk.attach(model, lk.Adapter.load(saved.save(tmp_path / "saved")))
    embedding = model.get_input_embeddings().adapter_bank["@default"].copy.weight
    assert model.get_output_embeddings().adapter_bank["@default"].copy.weight is embedding


def test_a_merge_keeps_tied_weights_tied_for_good():
    model = tied_model()
    base = base_hash(model)
    lk.attach(model, lk.FullConfig())
    randomise(model)
    for _ in range(2):
        lk.merge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        lk.unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base_hash(model) == base
    lk.merge(model)
    finalize(model)
    assert model.config.tie_word_embeddings


def test_a_merge_that_changes_one_of_two_tied_weights_unties_them():
    model = tied_model()
    lk.attach(model, lk.LoRAConfig(targets=("embed",)))
    randomise(model)
    lk.merge(model)
    finalize(model)
    assert not model.config.tie_word_embeddings


def test_modules_to_save_of_lora_stay_copies_apart():
    model = tied_model()
    plan = lk.attach(model, lk.LoRAConfig(modules_to_save=("embed_tokens", "lm_head")))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= trained(model).keys()
    assert plan.parameters == lk.extract(model).parameters


def test_a_half_precision_base_has_copies_in_float32_and_its_own_outputs():
    model = tied_model().bfloat16()
    before = outputs(model, example_inputs(model))
    lk.attach(model, lk.FullConfig())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    after = outputs(model, example_inputs(model))
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.02)


def test_relative_positions_follow_the_strength_of_a_route():
    model = build("deberta-v2")
    inputs = example_inputs(model)
    lk.attach(model, lk.FullConfig())
    positions = trained(model)["deberta.encoder.rel_embeddings.weight"]
    with torch.no_grad():
        positions += 1
    with lk.route(model, {"default": 0.5}):
        combined = outputs(model, inputs)
    lk.detach(model)
    with torch.no_grad():
        model.deberta.encoder.rel_embeddings.weight += 0.5
    torch.testing.assert_close(combined, outputs(model, inputs), rtol=1e-4, atol=1e-5)


def test_top_k_trains_the_last_blocks_alone():
    plan = lk.plan(build("llama", num_hidden_layers=4), lk.FullConfig(only_top=True))
    numbers = {path.split(".")[2] for path in plan.copies}
    assert numbers == {"2", "3"}
    assert all(path.startswith("model.layers.") for path in plan.copies)


def test_top_k_of_an_encoder_decoder_is_in_the_decoder():
    plan = lk.plan(build("t5"), TOP)
    assert plan.copies
    assert all(path.startswith("decoder.block.1.") for path in plan.copies)


def test_top_k_and_the_number_of_blocks():
    model = build("gpt2")
    every = lk.plan(model, lk.FullConfig(only_top=True, top=2))
    assert {path.split(".")[2] for path in every.copies} == {"0", "1"}
    with pytest.raises(TargetError, match=r"full\.top is 3, but there are 2 blocks"):
        lk.plan(model, lk.FullConfig(only_top=True, top=3))


def test_blocks_of_an_unknown_model_are_asked_for_and_can_be_named():
    model = nn.ModuleDict({"steps": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    with pytest.raises(TargetError, match=r"does not know the blocks.*full\.blocks"):
        lk.plan(model, TOP)
    named = lk.FullConfig(only_top=True, top=2, blocks=("steps.*",))
    assert lk.plan(model, named).copies == ("steps.1", "steps.2")
    with pytest.raises(TargetError, match=r"full\.blocks: 'stages\.\*' names no module"):
        lk.plan(model, lk.FullConfig(only_top=True, blocks=("stages.*",)))


def test_what_a_copy_cannot_hold_is_told_at_once():
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(2), "codes": nn.Linear(2, 2)})
    model["codes"].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"(?s)norm keeps running.*codes\.weight has no floating"):
        lk.plan(model, lk.FullConfig())
    with pytest.raises(TargetError, match="the model itself holds parameters"):
        lk.plan(nn.Linear(2, 2), lk.FullConfig())


def test_copies_other_than_the_settings_ask_for_are_listed():
    model = build("llama")
    lk.attach(model, TOP)
    saved = lk.extract(model)
    lk.detach(model)
    fewer = replace(saved, copied_modules=saved.copied_modules[1:])
    with pytest.raises(AdapterFileError, match=r"q_proj  top-k trains it here, the adapter has no"):
        lk.attach(model, fewer)
    wider = replace(saved, configs=(lk.FullConfig(only_top=True, top=2),))
    with pytest.raises(AdapterFileError, match=r"layers\.0\.mlp\.up_proj  top-k trains it here"):
        lk.attach(model, wider)
    with pytest.raises(AdapterFileError, match=r"layers\.1\.mlp\.up_proj  the adapter has a copy"):
        lk.attach(build("llama", num_hidden_layers=3), saved, allow_other_base=True)


def test_a_saved_adapter_whose_blocks_are_not_there_is_one_problem():
    model = build("llama", num_hidden_layers=3)
    lk.attach(model, lk.FullConfig(only_top=True, top=3))
    saved = lk.extract(model)
    with pytest.raises(AdapterFileError, match=r"full\.top is 3, but there are 2 blocks") as caught:
        lk.attach(build("llama"), saved, allow_other_base=True)
    assert "trains none here" not in str(caught.value)


def test_lora_below_the_trained_blocks_is_one_adapter_with_each_tensor_its_method():
    model = build("gpt2")
    with pytest.raises(TargetError, match="copied in full and adapted too"):
        lk.plan(model, [TOP, lk.LoRAConfig()])
    methods = [lk.LoRAConfig(layers="0"), TOP, lk.BitFitConfig()]
    fresh = lk.attach(model, methods)
    saved = lk.plan(model, lk.extract(model))
    for plan in (fresh, saved):
        assert plan.methods["transformer.h.0.attn.c_attn[q].lora_a"] == "lora"
        assert plan.methods["transformer.h.0.ln_1.bias"] == "bitfit"
        assert plan.methods["transformer.h.1.ln_1.bias"] == "top-k"


def test_the_match_table_has_a_line_for_each_kind_of_layer():
    text = str(lk.plan(build("llama"), lk.FullConfig()))
    line = next(line for line in text.splitlines() if line.endswith("self_attn.q_proj"))
    assert line.split() == ["full", "copy", "0–1", "2,048", "model.layers.*.self_attn.q_proj"]
    assert len(text.splitlines()) == 14


def test_positions_given_by_keyword_reach_the_copies_and_stay_with_their_rows():
    model = build("opt")
    positions = torch.stack([torch.arange(7) + 3, torch.arange(7).flip(0)])
    inputs = {**example_inputs(model), "position_ids": positions}
    before = outputs(model, inputs)
    lk.attach(model, lk.FullConfig())
    assert torch.equal(outputs(model, inputs), before)
    randomise(model)
    adapted = outputs(model, inputs)
    with lk.route(model, [None, "default"]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], adapted[1], rtol=1e-4, atol=1e-4)
