"""Slices of fused layers, checked against what the model itself takes them for."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.pytorch_utils import Conv1D

from lorakit.errors import TargetError
from lorakit.models.roles import targets_of
from lorakit.models.target_words import select_targets
from models.named_layers import names
from tiny_models import build, example_inputs


class AttentionInputs(TorchFunctionMode):
    """Collects the q, k and v of every call of torch's attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.scaled_dot_product_attention:
            self.calls.append(
                dict(zip("qkv", (tensor.clone() for tensor in args[:3]), strict=True))
            )
        return function(*args, **(kwargs or {}))


def attention_inputs(model, **more):
    """The q, k and v of the first block, by role; for each attention that it has."""
    with torch.no_grad(), AttentionInputs() as seen:
        model(**example_inputs(model), **more)
    return seen.calls[: len(seen.calls) // model.config.num_hidden_layers]


def bloom_inputs(model, monkeypatch):
    """The q, k and v of the first block of BLOOM, which has its own attention."""
    calls, split = [], BloomAttention._reshape

    def spy(self, fused):
        vectors = split(self, fused)
        calls.append(dict(zip("qkv", (tensor.clone() for tensor in vectors), strict=True)))
        return vectors

    monkeypatch.setattr(BloomAttention, "_reshape", spy)
    with torch.no_grad():
        model(**example_inputs(model))
    return calls[:1]


def zero(model, chosen):
    """Set the rows of slices to zero, in weight and bias."""
    for target in chosen:
        layer = model.get_submodule(target.path)
        weight = layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data
        for start, stop in target.rows:
            weight[start:stop] = 0
            if layer.bias is not None:
                layer.bias.data[start:stop] = 0


FUSED: dict[str, Any] = {
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
    "falcon-multi-query": ("falcon", {"multi_query": True, "bias": True}),
    "falcon-plain": ("falcon", {"multi_query": False, "bias": True}),
    "falcon-grouped": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-grouped-once": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4}),
    "phi3-grouped": ("phi3", {}),
    "phi3-plain": ("phi3", {"num_key_value_heads": 4}),
}


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("layout", FUSED)
def test_the_rows_of_a_slice_make_exactly_its_vectors(layout, role, monkeypatch):
    family, settings = FUSED[layout]
    model = build(family, **settings)

    def vectors():
        if family == "bloom":
            return bloom_inputs(model, monkeypatch)
        return attention_inputs(model)

    (before,) = vectors()
    zero(model, select_targets(model, (role,), layers="0"))
    (after,) = vectors()
    assert before[role].abs().min() > 0
    assert after[role].abs().max() == 0
    for other in {"q", "k", "v"} - {role}:
        assert torch.equal(before[other], after[other])


@pytest.mark.parametrize("role", ["q", "k", "v"])
def test_gpt2_cross_attention_has_a_fused_k_and_v_of_its_own(role):
    model = build("gpt2", add_cross_attention=True)
    states = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    (_, before) = attention_inputs(model, encoder_hidden_states=states)
    chosen = [p for p in select_targets(model, (role,), layers="0") if ".crossattention." in p.path]
    if role == "q":
        assert names(chosen) == ["transformer.h.0.crossattention.q_attn"]
        return
    zero(model, chosen)
    (_, after) = attention_inputs(model, encoder_hidden_states=states)
    assert after[role].abs().max() == 0
    other = {"k": "v", "v": "k"}[role]
    assert torch.equal(before[other], after[other])


def test_deberta_rows_of_v_make_exactly_its_values():
    model = build("deberta", pos_att_type=[])
    attention = model.deberta.encoder.layer[0].attention.self
    attention.v_bias.data.zero_()
    zero(model, select_targets(model, ("v",), layers="0"))
    contexts = []
    attention.register_forward_hook(lambda _module, _inputs, output: contexts.append(output[0]))
    output = model(**example_inputs(model), output_attentions=True)
    assert contexts[0].abs().max() == 0
    assert not torch.allclose(output.attentions[0], torch.full((), 1 / 7), atol=1e-4)


@pytest.mark.parametrize("role", ["q", "k"])
def test_deberta_rows_of_q_and_k_make_exactly_its_scores(role):
    model = build("deberta", pos_att_type=[])
    attention = model.deberta.encoder.layer[0].attention.self
    attention.q_bias.data.zero_()
    zero(model, select_targets(model, (role,), layers="0"))
    contexts = []
    attention.register_forward_hook(lambda _module, _inputs, output: contexts.append(output[0]))
    output = model(**example_inputs(model), output_attentions=True)
    assert torch.allclose(output.attentions[0], torch.full((), 1 / 7))
    assert contexts[0].abs().min() > 0


@pytest.mark.parametrize("role", ["gate", "up"])
def test_phi3_rows_of_gate_and_up_make_exactly_their_halves(role):
    model = build("phi3")
    mlp = model.model.layers[0].mlp
    seen: dict[str, Any] = {}
    mlp.activation_fn.register_forward_hook(
        lambda _module, inputs, output: seen.update(gate=inputs[0], activated=output)
    )
    mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: seen.update(hidden=inputs[0]))
    zero(model, select_targets(model, (role,), layers="0"))
    model(**example_inputs(model))
    assert (seen["gate"].abs().max() == 0) == (role == "gate")
    assert seen["hidden"].abs().max() == 0


@pytest.mark.parametrize("layout", FUSED)
def test_slices_divide_the_rows_of_the_fused_layer(layout):
    family, settings = FUSED[layout]
    model = build(family, **settings)
    fused = {target.path for target in targets_of(model) if target.rows is not None}
    assert fused
    for path in fused:
        layer = model.get_submodule(path)
        rows = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        covered = [
            row
            for target in targets_of(model)
            if target.path == path and target.rows is not None
            for start, stop in target.rows
            for row in range(start, stop)
        ]
        assert sorted(covered) == list(range(rows))


def test_a_fused_layer_of_another_size_than_its_config_is_an_error():
    model = build("gpt_neox")
    model.gpt_neox.layers[0].attention.query_key_value = nn.Linear(32, 97)
    with pytest.raises(TargetError, match=r"query_key_value has 97 output rows.*groups of 24"):
        targets_of(model)
