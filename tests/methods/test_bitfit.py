"""BitFit: all biases of a model and nothing else, and new ones where there are none."""

from dataclasses import replace

import pytest
import torch
import transformers

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AdapterFileError, MergeError, TargetError
from lorakit.models.roles import task_heads
from references import outputs, randomise
from tiny_models import FAMILIES, build, example_inputs

WITHOUT = {"llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "falcon"} | {
    "phi3",
    "t5",
}


def is_bias(name):
    # T5's relative_attention_bias is an embedding.
    return name.rpartition(".")[2].endswith("bias")


@sampled("family", FAMILIES)
def test_it_trains_every_bias_or_says_that_there_is_none(family):
    model = build(family)
    heads = tuple(f"{head}." for head in task_heads(model))
    expected = {n for n, _ in model.named_parameters() if is_bias(n) or n.startswith(heads)}
    if not expected:
        with pytest.raises(TargetError, match=f"{family} has none: bitfit.add_missing"):
            lk.attach(model, lk.BitFitConfig())
        return
    before = outputs(model, example_inputs(model))
    lk.attach(model, lk.BitFitConfig())
    assert {name for name, _ in adapter_parameters(model, "default")} == expected
    assert torch.equal(outputs(model, example_inputs(model)), before)


def test_biases_that_are_read_and_not_added_train_too():
    model = build("deberta")
    inputs = example_inputs(model)
    lk.attach(model, lk.BitFitConfig())
    randomise(model)
    values = {name: p.detach().clone() for name, p in adapter_parameters(model, "default")}
    assert "deberta.encoder.layer.0.attention.self.q_bias" in values
    plain = build("deberta")
    plain.load_state_dict(values, strict=False)
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs))


def test_biases_that_top_k_trains_too_are_trained_once(tmp_path):
    model = build("deberta")
    lk.attach(model, [lk.FullConfig(only_top=True, top=1), lk.BitFitConfig()])
    randomise(model)
    after = outputs(model, example_inputs(model))
    names = [name for name, _ in adapter_parameters(model, "default")]
    assert len(names) == len(set(names))
    folder = lk.extract(model).save(tmp_path / "both")
    again = build("deberta")
    lk.attach(again, lk.Adapter.load(folder))
    assert torch.equal(outputs(again, example_inputs(again)), after)


def test_biases_that_are_read_train_beside_a_bottleneck_at_the_same_place():
    both = build("deberta")
    at = ("deberta.encoder.layer.*.attention.self",)
    lk.attach(both, [lk.BitFitConfig(), lk.BottleneckConfig(at=at, size=2)])
    randomise(both)
    inputs = example_inputs(both)
    values = dict(adapter_parameters(both, "default"))
    before = outputs(both, inputs)
    with torch.no_grad():
        values["deberta.encoder.layer.0.attention.self.q_bias"].add_(0.5)
    assert not torch.allclose(outputs(both, inputs), before)


def test_a_classifier_s_bias_is_none_of_the_pre_trained_model():
    model = build("llama", head="ForSequenceClassification", num_labels=2, pad_token_id=0)
    model.score = torch.nn.Linear(32, 2)
    for config in (lk.BitFitConfig(), lk.LoRAConfig(bias="all")):
        with pytest.raises(TargetError, match=r"has none|none of the layers has one"):
            lk.plan(model, config)


def test_a_bias_that_two_modules_hold_is_trained_once():
    model = build("bert", head="ForMaskedLM")
    assert isinstance(model, transformers.BertForMaskedLM)
    lk.attach(model, lk.BitFitConfig())
    names = [n for n, _ in adapter_parameters(model, "default") if n.startswith("cls.predictions")]
    assert "cls.predictions.decoder.bias" in names
    assert "cls.predictions.bias" not in names


def test_added_biases_are_those_of_linear_layers_in_blocks_and_start_at_zero():
    model = build("llama")
    lk.attach(model, lk.BitFitConfig(add_missing=True))
    linear = ("q", "k", "v", "o", "gate", "up", "down")
    tensors = lk.extract(model).tensors
    assert len(tensors) == 2 * len(linear)
    assert all(name.endswith("_proj.added_bias") for name in tensors)
    assert not any(tensor.any() for tensor in tensors.values())


def test_biases_that_are_there_stay_beside_added_ones():
    model = build("qwen2")
    lk.attach(model, lk.BitFitConfig(add_missing=True))
    names = set(lk.extract(model).tensors)
    assert "model.layers.0.self_attn.q_proj.bias" in names
    assert "model.layers.0.self_attn.o_proj.added_bias" in names
    assert "model.layers.0.self_attn.q_proj.added_bias" not in names


def test_added_biases_are_what_a_model_with_biases_has():
    model = build("llama")
    inputs = example_inputs(model)
    lk.attach(model, lk.BitFitConfig(add_missing=True))
    randomise(model)
    values = {name: p.detach().clone() for name, p in adapter_parameters(model, "default")}
    plain = build("llama")
    for name, value in values.items():
        layer = plain.get_submodule(name.removesuffix(".added_bias"))
        layer.bias = torch.nn.Parameter(value)
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs))


def test_an_added_bias_says_why_it_cannot_be_merged():
    model = build("llama")
    lk.attach(model, lk.BitFitConfig(add_missing=True))
    with pytest.raises(MergeError, match="the layer has no bias that could hold the added one"):
        lk.merge(model)


def test_a_bias_that_is_missing_from_an_adapter_is_named():
    model = build("gpt2")
    lk.attach(model, lk.BitFitConfig())
    saved = lk.extract(model)
    lk.detach(model)
    lost = "transformer.h.1.ln_2.bias"
    rest = {name: tensor for name, tensor in saved.tensors.items() if name != lost}
    with pytest.raises(AdapterFileError, match=rf"{lost}  missing from the adapter"):
        lk.attach(model, replace(saved, tensors=rest))
