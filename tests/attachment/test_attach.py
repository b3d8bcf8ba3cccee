"""Attaching, routing, switching and detaching: what they do, and what they refuse."""

import dataclasses

import pytest
import torch

import lorakit as lk
from calls import calls_in
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import (
    AdapterFileError,
    AttachError,
    TargetError,
)
from references import attach_random, base_hash, outputs, randomise
from tiny_models import build, example_inputs


@pytest.fixture
def model():
    return build("llama")


@pytest.fixture
def inputs(model):
    return example_inputs(model)


def test_two_adapters_live_beside_each_other(model, inputs):
    base = outputs(model, inputs)
    attach_random(model, "one", rank=2)
    one = outputs(model, inputs)
    attach_random(model, "two", seed=1, rank=3, targets=("k", "mlp"))
    two = outputs(model, inputs)
    assert adapter_names(model) == ("one", "two")
    assert active_name(model) == "two"
    lk.switch(model, "one")
    assert torch.equal(outputs(model, inputs), one)
    lk.switch(model, None)
    assert torch.equal(outputs(model, inputs), base)
    lk.detach(model, "one")
    lk.switch(model, "two")
    assert torch.equal(outputs(model, inputs), two)


def test_names_may_hold_anything(model, inputs):
    for name in ("org/task.v1", "keys", "50%", "ä b", ""):
        attach_random(model, name, rank=2)
    assert adapter_names(model) == ("org/task.v1", "keys", "50%", "ä b", "")
    lk.switch(model, "org/task.v1")
    outputs(model, inputs)


def test_a_taken_name_is_refused_and_nothing_changes(model, inputs):
    attach_random(model)
    before = outputs(model, inputs)
    with pytest.raises(AttachError, match="'default' is attached already"):
        lk.attach(model, lk.LoRAConfig(targets=("mlp",)))
    assert torch.equal(outputs(model, inputs), before)


def test_one_wrong_target_beside_a_good_one_is_an_error(model):
    before = base_hash(model)
    with pytest.raises(TargetError, match="has no layer called 'value'"):
        lk.attach(model, lk.LoRAConfig(targets=("q", "value")))
    assert base_hash(model) == before
    assert not any("adapter_bank" in name for name, _ in model.named_modules())


def test_every_wrong_pattern_is_told(model):
    with pytest.raises(TargetError, match="'down' names none of the adapted layers"):
        lk.attach(model, lk.LoRAConfig(rank_pattern={"q": 2, "down": 4}))
    with pytest.raises(TargetError, match="no module is called 'clasifier'"):
        lk.attach(model, lk.LoRAConfig(modules_to_save=("clasifier",)))
    with pytest.raises(TargetError, match="none of the layers has one"):
        lk.attach(model, lk.LoRAConfig(bias="lora"))


def test_patterns_set_rank_and_alpha_of_some_layers(model):
    config = lk.LoRAConfig(
        rank=4, alpha=8, rank_pattern={"v": 2, "re:.*layers.1.*v_proj": 6}, alpha_pattern={"v": 12}
    )
    plan = lk.plan(model, config)
    found = {site.path.split("model.layers.")[1]: (site.rank, site.scale) for site in plan.sites}
    assert found == {
        "0.self_attn.q_proj": (4, 2.0),
        "0.self_attn.v_proj": (2, 6.0),
        "1.self_attn.q_proj": (4, 2.0),
        "1.self_attn.v_proj": (6, 2.0),
    }


def test_the_match_table_shows_each_site():
    plan = lk.plan(build("gpt2"), lk.LoRAConfig(rank=2, alpha=3, targets=("q", "wte")))
    assert plan.table(full=True).splitlines() == [
        "role   shape  layers  rank  scale  parameters  module",
        "embed  32×64          2     1.5    192         transformer.wte",
        "q      32×32  0       2     1.5    128         transformer.h.0.attn.c_attn[q]",
        "q      32×32  1       2     1.5    128         transformer.h.1.attn.c_attn[q]",
        "448 parameters are trained",
    ]


def test_layers_that_are_alike_share_a_line_of_the_match_table():
    config = lk.LoRAConfig(rank=2, targets=("q", "v"), rank_pattern={"*.1.*v_proj": 4})
    plan = lk.plan(build("llama"), config)
    assert str(plan).splitlines() == [
        "role  shape  layers  rank  scale  parameters  module",
        "q     32×32  0–1     2     1      256         model.layers.*.self_attn.q_proj",
        "v     16×32  0       2     1      96          model.layers.0.self_attn.v_proj",
        "v     16×32  1       4     1      192         model.layers.1.self_attn.v_proj",
        "544 parameters are trained",
    ]
    assert repr(plan) == "Plan(lora: 4 × low-rank update; 544 parameters)"


def test_a_printed_model_shows_rank_scale_and_adapters_of_its_layers():
    model = build("gpt2")
    lk.attach(model, lk.LoRAConfig(rank=2, alpha=3, targets=("q", "v")), name="org/a.v1")
    lk.attach(model, lk.LoRAConfig(rank=4, targets=("c_attn",)), name="50%")
    lines = [line.strip() for line in str(model).splitlines()]
    expected = "org/a.v1: q rank 2, scale 1.5, v rank 2, scale 1.5; 50%: rank 4, scale 1"
    assert any(line.endswith(f"(adapter_bank): {expected}") for line in lines)
    linear = build("llama")
    lk.attach(linear, lk.LoRAConfig(rank=2, targets=("q",)))
    assert "(adapter_bank): default: rank 2, scale 1\n" in str(linear)
    # Blocks that are alike are still printed once.
    assert "(0-1): 2 x GPT2Block(" in lines


def test_adapting_one_of_two_tied_weights_leaves_the_other_alone():
    model = build("llama", tie_word_embeddings=True)
    inputs = example_inputs(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hashed, hidden = base_hash(model), model.model(**inputs).last_hidden_state
    attach_random(model, targets=("head",))
    adapted = outputs(model, inputs)
    assert torch.equal(model.model(**inputs).last_hidden_state, hidden)
    lk.merge(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.model(**inputs).last_hidden_state, hidden)
    torch.testing.assert_close(outputs(model, inputs), adapted, rtol=1e-4, atol=1e-5)
    lk.detach(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert base_hash(model) == hashed


def test_every_misfit_of_an_adapter_is_told_at_once(model):
    attach_random(model, rank=2)
    adapter = lk.extract(model)
    lk.detach(model)
    tensors = dict(adapter.tensors)
    wide = tensors.pop("model.layers.0.self_attn.q_proj.lora_b")
    tensors["model.layers.1.self_attn.v_proj.lora_a"] = torch.zeros(4, 32)
    tensors["model.layers.9.self_attn.v_proj.lora_a"] = wide
    with pytest.raises(AdapterFileError) as error:
        lk.attach(model, dataclasses.replace(adapter, tensors=tensors))
    text = str(error.value)
    assert "3 problems" in text
    assert "model.layers.0.self_attn.q_proj.lora_b  missing" in text
    assert "(4, 32) in the adapter, (2, 32) expected: was it trained with rank 4?" in text
    assert "model.layers.9.self_attn.v_proj.lora_a  in the adapter, but it has no place" in text
    assert adapter_names(model) == ()


def test_a_layer_left_out_of_an_adapter_is_missed(model):
    attach_random(model, rank=2)
    adapter = lk.extract(model)
    lk.detach(model)
    fewer = dataclasses.replace(
        adapter,
        sites=adapter.sites[:-1],
        tensors={k: v for k, v in adapter.tensors.items() if "layers.1.self_attn.v" not in k},
    )
    with pytest.raises(AdapterFileError, match=r"v_proj  is among the targets"):
        lk.attach(model, fewer)


def test_another_base_of_equal_shapes_is_refused(model):
    attach_random(model)
    adapter = lk.extract(model)
    other = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.01)
    with pytest.raises(AdapterFileError, match="trained on another base"):
        lk.attach(other, adapter)
    lk.attach(other, adapter, allow_other_base=True)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_accepted(trained, used):
    model = build("llama").to(trained)
    attach_random(model)
    adapter = lk.extract(model)
    lk.attach(build("llama").to(used), adapter)
    # A checkpoint saved in half precision and loaded in float32 is the same base, too.
    lk.attach(build("llama").to(used).float(), adapter)


def test_one_changed_layer_is_another_base(model):
    attach_random(model)
    adapter = lk.extract(model)
    other = build("llama").to(torch.bfloat16)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.02)
    with pytest.raises(AdapterFileError, match="of the sampled weights differ"):
        lk.attach(other, adapter)


def test_what_is_not_attached_cannot_be_used(model):
    with pytest.raises(AttachError, match="no adapter: attach one first"):
        lk.extract(model)
    with pytest.raises(AttachError, match="no adapter"):
        lk.detach(model)
    attach_random(model, "one")
    with pytest.raises(AttachError, match=r"no adapter called 'two'.*attached: one"):
        lk.switch(model, "two")


def test_generation_uses_the_adapter(model):
    ids = torch.tensor([[3, 4, 5]])
    attach_random(model, targets=("all-linear",))
    randomise(model, std=1.0)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for _ in range(written.shape[1] - 3):
            following = model(ids).logits[0, -1].argmax()
            ids = torch.cat([ids, following[None, None]], dim=1)
    assert torch.equal(written, ids)


def test_an_adapter_is_shown_in_one_line(model):
    lk.attach(
        model, [lk.LoRAConfig(rank=2, rank_pattern={"v": 4}), lk.BitFitConfig(add_missing=True)]
    )
    adapter = lk.extract(model)
    assert repr(adapter) == (
        f"Adapter(lora+bitfit r 2/4, 4 updates, {adapter.parameters:,} parameters in float32, "
        "base unnamed)"
    )
    bare = dataclasses.replace(adapter, tensors={}, sites=(), base=None)
    assert repr(bare) == "Adapter(lora+bitfit, no tensors)"


def test_attaching_calls_other_files_at_most_fifteen_times():
    model, config = build("llama", num_hidden_layers=1), lk.LoRAConfig(rank=2, targets="q")
    own = "attachment/attach.py"
    calls = calls_in(lambda: lk.attach(model, config))
    out = [call for call in calls if call.caller == own and call.file not in ("", own)]
    assert 0 < len(out) <= 15, out
