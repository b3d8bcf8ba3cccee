"""Merging and its undoing: what is written, what rounding costs, and that the base comes back."""

import copy
import random
import sys
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.attachment.original_weights import FileWeight
from lorakit.attachment.state import adapter_names
from lorakit.errors import LorakitError, MergeError
from lorakit.merging.merge import finalize
from references import attach_random, base_hash, outputs
from tiny_models import build, example_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(dtype):
    model = build("llama").to(dtype)
    hashed = base_hash(model)
    attach_random(model, targets=("all-linear", "embed", "head"))
    for _ in range(3):
        lk.merge(model)
        assert base_hash(model) != hashed
        lk.unmerge(model)
        assert base_hash(model) == hashed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_the_float32_sum_rounded_once(dtype):
    model = build("llama").to(dtype)
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().float().clone()
    attach_random(model, alpha=3)
    adapter = lk.extract(model)
    a, b = (adapter.tensors[f"model.layers.0.self_attn.q_proj.lora_{x}"] for x in "ab")
    lk.merge(model)
    exact = weight.double() + (b.double() @ a.double()) * (3 / 8)
    expected = torch.addmm(weight, b, a, alpha=3 / 8)
    assert (expected - exact).abs().max() < 1e-7
    expected = expected.to(dtype)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)


def test_the_report_measures_what_rounding_destroys():
    model = build("llama").to(torch.bfloat16)
    attach_random(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.mul_(1e-4)
    report = lk.merge(model)
    assert report.worst.relative_update < 0.01
    assert report.worst.rounding_error > 0.1
    assert report.warning is not None
    assert "rounding destroyed" in report.warning
    assert report.warning in str(report)
    lk.unmerge(model)
    assert lk.merge(model.float()).warning is None


def test_the_report_gives_the_largest_change_of_a_logit():
    model = build("llama").to(torch.bfloat16)
    inputs = example_inputs(model)
    attach_random(model)
    before = outputs(model, inputs)
    report = lk.merge(model, probe=inputs)
    operation = (outputs(model, inputs).float() - before.float()).abs().max().item()
    assert report.logit_change == operation > 0


def test_a_failed_merge_leaves_the_base_as_it_was(monkeypatch):
    model = build("llama")
    hashed = base_hash(model)
    attach_random(model)
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return original(*args)

    # lorakit.merging.merge is also the name of the function, so the module is looked up by its key.
    module = sys.modules["lorakit.merging.merge"]
    original = module._measure
    monkeypatch.setattr(module, "_measure", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        lk.merge(model)
    assert base_hash(model) == hashed
    monkeypatch.undo()
    lk.merge(model)
    lk.detach(model)
    assert base_hash(model) == hashed


def test_original_weights_can_stay_in_the_checkpoint_file(tiny_llama):
    file = tiny_llama / "model.safetensors"
    bits = file.read_bytes()
    model: Any = lk.load_model(str(tiny_llama))[0]
    hashed = base_hash(model)
    attach_random(model)
    lk.merge(model, original_weights="checkpoint")
    kept = model._lorakit.original_weights["model.layers.0.self_attn.q_proj"]["weight"]
    assert isinstance(kept, FileWeight)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        lk.unmerge(each)
        assert base_hash(each) == hashed
    assert file.read_bytes() == bits


def test_a_checkpoint_in_another_precision_is_no_source(tiny_llama):
    model: Any = lk.load_model(str(tiny_llama), dtype="bfloat16")[0]
    hashed = base_hash(model)
    attach_random(model)
    lk.merge(model, original_weights="checkpoint")
    kept = model._lorakit.original_weights["model.layers.0.self_attn.q_proj"]["weight"]
    assert isinstance(kept, torch.Tensor)
    lk.unmerge(model)
    assert base_hash(model) == hashed


def test_mistakes_are_told():
    model = build("llama")
    with pytest.raises(LorakitError, match="no adapter"):
        lk.merge(model)
    attach_random(model)
    with pytest.raises(MergeError, match="no adapter is merged"):
        lk.unmerge(model)
    lk.merge(model)
    with pytest.raises(MergeError, match="merged already"):
        lk.merge(model)
    with pytest.raises(LorakitError, match="merged"):
        lk.attach(model, lk.LoRAConfig(), name="two")


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_finalized_merge_is_a_plain_model_that_loads_anywhere(family, tmp_path):
    tied: dict[str, Any] = {"tie_word_embeddings": True} if family == "llama" else {}
    model = build(family, **tied)
    inputs = example_inputs(model)
    targets = ("q", "v", "head") if family == "llama" else ("q", "v")
    attach_random(model, targets=targets)
    unmerged = outputs(model, inputs)
    lk.merge(model)
    finalize(model)
    assert not any("adapter" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(outputs(loaded, inputs), unmerged, rtol=1e-4, atol=2e-5)


@pytest.mark.thorough
def test_a_thousand_random_steps_leave_the_base_unchanged():
    """Attach, merge, switch, unmerge, fail, detach in any order, in bf16."""
    model = build("llama", tie_word_embeddings=True).to(torch.bfloat16)
    hashed = base_hash(model)
    draw = random.Random(0)
    names = ("one", "two", "three")
    choices = (("q", "v"), ("all-linear",), ("embed", "head"), ("down",))
    done, refused = 0, 0

    def step():
        verb, name = (
            draw.choice(("attach", "merge", "switch", "unmerge", "detach")),
            draw.choice(names),
        )
        if verb == "attach":
            attach_random(
                model, name, seed=draw.randrange(99), targets=draw.choice(choices), rank=2
            )
        elif verb == "merge":
            lk.merge(model, name, probe={} if draw.random() < 0.3 else None)
        elif verb == "unmerge":
            lk.unmerge(model)
        elif verb == "detach":
            lk.detach(model, draw.choice([None, name]))
        else:
            lk.switch(model, draw.choice([None, name]))

    for _ in range(1000):
        try:
            step()
            done += 1
        except (LorakitError, ValueError):
            # A probe without inputs makes the model itself fail in the middle of a merge.
            refused += 1
        if draw.random() < 0.05:
            model = copy.deepcopy(model)
        if adapter_names(model) == ():
            assert base_hash(model) == hashed
    assert done > 300
    assert refused > 50
    if adapter_names(model):
        lk.detach(model)
    assert base_hash(model) == hashed
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_report_is_shown_in_one_line_or_a_line_for_weights_that_are_alike():
    model = build("llama").to(torch.bfloat16)
    attach_random(model, std=1e-3)
    report = lk.merge(model)
    lost = f"{100 * report.worst.rounding_error:.2g}%"
    head, *lines, _, _ = str(report).splitlines()
    assert head.split() == ["at", "most,", "of", "weights", "|dW|/|W|", "lost", "to", "rounding"]
    assert [line.split()[:2] for line in lines] == [
        ["model.layers.*.self_attn.q_proj.weight", "2"],
        ["model.layers.*.self_attn.v_proj.weight", "2"],
    ]
    assert lost in {line.split()[-1] for line in lines}
    assert repr(report) == (
        f"MergeReport('default' in 4 weights, at most {lost} of ΔW lost, with a warning)"
    )
