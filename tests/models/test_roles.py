import fnmatch
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.pytorch_utils import Conv1D

from lorakit.errors import TargetError
from lorakit.models.paths import block_number
from lorakit.models.roles import select_targets, targets_by_word, targets_of, task_heads
from tiny_models import FAMILIES, build, example_inputs

DECODERS = FAMILIES[: FAMILIES.index("bert")]
ENCODERS = FAMILIES[FAMILIES.index("bert") : FAMILIES.index("t5")]

LLAMA = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
BERT = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
BLOOM = {
    "q": "self_attention.query_key_value[q]",
    "k": "self_attention.query_key_value[k]",
    "v": "self_attention.query_key_value[v]",
    "o": "self_attention.dense",
    "up": "mlp.dense_h_to_4h",
    "down": "mlp.dense_4h_to_h",
}
# What the layers of block 0 are called, after the block's own path.
NAMES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"), LLAMA
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), BERT),
    **dict.fromkeys(("bloom", "falcon"), BLOOM),
    "gpt2": {
        "q": "attn.c_attn[q]",
        "k": "attn.c_attn[k]",
        "v": "attn.c_attn[v]",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    "gpt_neox": {
        "q": "attention.query_key_value[q]",
        "k": "attention.query_key_value[k]",
        "v": "attention.query_key_value[v]",
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    "gptj": {
        "q": "attn.q_proj",
        "k": "attn.k_proj",
        "v": "attn.v_proj",
        "o": "attn.out_proj",
        "up": "mlp.fc_in",
        "down": "mlp.fc_out",
    },
    "opt": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "fc1",
        "down": "fc2",
    },
    "phi": {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.dense",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    "phi3": {
        "q": "self_attn.qkv_proj[q]",
        "k": "self_attn.qkv_proj[k]",
        "v": "self_attn.qkv_proj[v]",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_up_proj[gate]",
        "up": "mlp.gate_up_proj[up]",
        "down": "mlp.down_proj",
    },
    "deberta": {
        **BERT,
        "q": "attention.self.in_proj[q]",
        "k": "attention.self.in_proj[k]",
        "v": "attention.self.in_proj[v]",
    },
    "deberta-v2": {
        **BERT,
        "q": "attention.self.query_proj",
        "k": "attention.self.key_proj",
        "v": "attention.self.value_proj",
    },
    "distilbert": {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    "vit": {
        "q": "attention.q_proj",
        "k": "attention.k_proj",
        "v": "attention.v_proj",
        "o": "attention.o_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
}


def names(chosen):
    return [target.name for target in chosen]


def paths(chosen):
    return [target.path for target in chosen]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "t5"])
def test_each_role_names_one_layer_of_each_block(family):
    model = build(family)
    block = next(target.path for target in targets_of(model) if block_number(target.path) == 0)
    block = block[: block.index(".0.") + 2]
    for role, name in NAMES[family].items():
        expected = [f"{block}.{name}", f"{block[:-1]}1.{name}"]
        assert names(select_targets(model, (role,))) == expected, role


def test_t5_roles_name_self_and_cross_attention_of_both_stacks():
    model = build("t5")
    for role in ("q", "k", "v", "o"):
        assert names(select_targets(model, (role,), layers="1")) == [
            f"encoder.block.1.layer.0.SelfAttention.{role}",
            f"decoder.block.1.layer.0.SelfAttention.{role}",
            f"decoder.block.1.layer.1.EncDecAttention.{role}",
        ]
    for role, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
        assert names(select_targets(model, (role,), layers="1")) == [
            f"encoder.block.1.layer.1.DenseReluDense.{name}",
            f"decoder.block.1.layer.2.DenseReluDense.{name}",
        ]


def test_t5_embeds_in_each_stack():
    chosen = select_targets(build("t5"), ("embed",))
    assert paths(chosen) == ["encoder.embed_tokens", "decoder.embed_tokens"]


def test_t5_without_gate_has_up_and_down():
    model = build("t5", feed_forward_proj="relu")
    assert {path.rpartition(".")[2] for path in paths(select_targets(model, ("mlp",)))} == {
        "wi",
        "wo",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_block_has_a_role(family):
    model = build(family)
    with_role = {target.path for target in targets_of(model) if target.role is not None}
    matrices = {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and block_number(path) is not None
    }
    # DeBERTa projects relative positions too; no other architecture has such layers.
    assert {path for path in matrices - with_role if ".pos_" not in path} == set()
    assert matrices


@pytest.mark.parametrize("family", FAMILIES)
def test_embed_and_head_are_the_layers_that_the_forward_pass_calls(family):
    model = build(family)
    words = ("embed", "head") if family in (*DECODERS, "t5") else ("embed",)
    called = []
    chosen = select_targets(model, words)
    for target in chosen:
        hook = lambda _module, _inputs, _output, path=target.path: called.append(path)  # noqa: E731
        model.get_submodule(target.path).register_forward_hook(hook)
    model(**example_inputs(model))
    assert set(called) == set(paths(chosen))
    assert {target.role for target in chosen} == set(words)


def test_vit_of_earlier_transformers_is_known():
    model = nested(
        "vit.encoder.layer.0.attention.attention.query",
        "vit.encoder.layer.0.attention.attention.key",
        "vit.encoder.layer.0.attention.attention.value",
        "vit.encoder.layer.0.attention.output.dense",
        "vit.encoder.layer.0.intermediate.dense",
        "vit.encoder.layer.0.output.dense",
    )
    model.config = SimpleNamespace(model_type="vit")
    assert [target.role for target in targets_of(model)] == ["q", "k", "v", "o", "up", "down"]


def nested(*wanted):
    """A module with a Linear at each path."""
    root = nn.Module()
    for path in wanted:
        parent = root
        *parts, leaf = path.split(".")
        for part in parts:
            if part not in dict(parent.named_children()):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(leaf, nn.Linear(2, 2))
    return root


# Slices of fused layers, checked against what the model itself takes them for.


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


# Words.


def test_a_role_selects_slices_and_a_path_selects_the_whole_layer():
    model = build("gpt2")
    assert names(select_targets(model, ("v",), layers="0")) == ["transformer.h.0.attn.c_attn[v]"]
    assert names(select_targets(model, ("c_attn",), layers="0")) == ["transformer.h.0.attn.c_attn"]
    assert names(select_targets(model, ("c_attn[v]",), layers="0")) == [
        "transformer.h.0.attn.c_attn[v]"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_stand_for_their_roles(family):
    model = build(family)
    known = {target.role for target in targets_of(model)}
    assert {p.role for p in select_targets(model, ("attention",))} == {"q", "k", "v", "o"}
    assert {p.role for p in select_targets(model, ("mlp",))} == {"gate", "up", "down"} & known


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("llama", None),
        ("gpt2", None),
        ("opt", None),
        ("t5", None),
        ("phi3", None),
        ("bert", "SEQ_CLS"),
        ("roberta", "SEQ_CLS"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`")
def test_all_linear_means_what_it_means_in_peft(family, task):
    model = build(family)
    ours = paths(select_targets(model, ("all-linear",)))
    config = peft.LoraConfig(target_modules="all-linear", task_type=task)
    theirs = peft.get_peft_model(build(family), config).base_model.targeted_module_names
    assert ours == theirs


def test_a_path_word_matches_whole_components_at_the_end():
    model = build("llama")
    assert paths(select_targets(model, ("layers.1.mlp.up_proj",))) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(TargetError):
        select_targets(model, ("p_proj",))


def test_a_glob_and_a_regex_match_the_whole_path():
    model = build("llama")
    expected = [path for path in paths(targets_of(model)) if fnmatch.fnmatch(path, "*.1.mlp.*")]
    assert len(expected) == 3
    assert paths(select_targets(model, ("model.layers.1.mlp.*",))) == expected
    assert paths(select_targets(model, (r"re:.*\.1\.mlp\.(gate|up|down)_proj",))) == expected
    with pytest.raises(TargetError):
        select_targets(model, ("re:mlp",))


def test_a_role_word_wins_over_a_module_of_that_name():
    model = build("llama")
    model.model.layers[0].up = nn.Linear(2, 2)
    assert names(select_targets(model, ("up",))) == [
        f"model.layers.{n}.mlp.up_proj" for n in (0, 1)
    ]


def test_places_come_once_and_in_module_order():
    model = build("gpt2")
    order = names(targets_of(model))
    chosen = names(select_targets(model, ("down", "mlp", "q", "attention")))
    assert chosen == [name for name in order if name in set(chosen)]
    assert len(chosen) == 12


def test_layers_keep_only_those_blocks():
    model = build("llama", num_hidden_layers=4)
    assert paths(select_targets(model, ("q",), layers="0,2-3")) == [
        f"model.layers.{number}.self_attn.q_proj" for number in (0, 2, 3)
    ]


def test_a_numbered_task_head_is_no_block():
    model = build("bert")
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    told = message(model, "classifier.0", layers="0")
    assert told == "nothing of 'classifier.0' is left after layers '0'."
    assert "bert has 2 blocks" in message(model, "q", layers="2")


def test_exclude_takes_away_layers_and_the_slices_of_a_layer():
    model = build("gpt2")
    assert names(select_targets(model, ("attention",), exclude=("k", "h.1.attn.c_attn"))) == [
        "transformer.h.0.attn.c_attn[q]",
        "transformer.h.0.attn.c_attn[v]",
        "transformer.h.0.attn.c_proj",
        "transformer.h.1.attn.c_proj",
    ]


def test_no_words_select_nothing():
    assert select_targets(build("gpt2"), ()) == ()


def test_named_gives_the_places_of_each_word():
    model = build("gpt2")
    found = targets_by_word(model, ("q", "h.0.attn.c_attn"))
    assert names(found["q"]) == [f"transformer.h.{n}.attn.c_attn[q]" for n in (0, 1)]
    layer = "transformer.h.0.attn.c_attn"
    assert names(found["h.0.attn.c_attn"]) == [layer, *(f"{layer}[{role}]" for role in "qkv")]


def test_path_words_work_on_any_module():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2), nn.Embedding(3, 2))
    assert paths(targets_of(model)) == ["0", "2", "3"]
    assert paths(select_targets(model, ("0", "3"))) == ["0", "3"]
    assert paths(select_targets(model, ("all-linear",))) == ["2"]


@pytest.mark.parametrize("family", ENCODERS)
def test_no_role_but_its_path_names_a_task_head(family):
    model = build(family)
    heads = task_heads(model)
    inside = [target for target in targets_of(model) if target.path.startswith(heads)]
    assert inside
    assert {target.role for target in inside} == {None}
    assert not set(select_targets(model, ("all-linear",))) & set(inside)
    assert set(select_targets(model, (f"{heads[-1]}*",))) <= set(inside)


def test_a_layer_of_a_task_head_has_no_role_whatever_its_name():
    model = build("bert")
    model.classifier = nested("output.dense")
    assert [
        target.role for target in targets_of(model) if target.path == "classifier.output.dense"
    ] == [None]


# Mistakes.


def message(model, *words, **settings):
    with pytest.raises(TargetError) as caught:
        select_targets(model, words, **settings)
    return str(caught.value)


def test_an_unknown_word_is_answered_with_the_roles():
    told = "gpt2 has no layer called 'value'. Its layers are q, k, v, o, up, down."
    assert message(build("gpt2"), "value") == told
    assert message(build("gpt2"), "q", "value") == told


def test_a_role_that_the_family_lacks_is_unknown():
    assert message(build("gpt2"), "gate").startswith("gpt2 has no layer called 'gate'.")
    assert message(build("bert"), "head").startswith("bert has no layer called 'head'")


def test_the_nearest_name_is_suggested():
    assert "'c_atn' (did you mean 'c_attn'?)" in message(build("gpt2"), "c_atn")
    told = message(build("llama"), "self_attn.q_porj")
    assert "(did you mean 'self_attn.q_proj'?)" in told


def test_all_problems_are_told_at_once():
    told = message(build("gpt2"), "q", "value", "re:(", "wat", layers="0-7", exclude=("nope",))
    assert told.splitlines()[0] == "the layers of gpt2 cannot be chosen (4 problems):"
    assert "no layers called 'value', 'wat'" in told
    assert "'re:(' is not a regular expression" in told
    assert "exclude: gpt2 has no layer called 'nope'" in told
    assert "layers '0-7' goes up to block 7, but gpt2 has 2 blocks" in told


def test_an_unknown_architecture_is_said_to_be_unknown():
    model = nested("body.fc1", "body.fc2", "out")
    assert message(model, "q", "v") == (
        "Module has no layers called 'q', 'v'. lorakit does not know the roles of this"
        " architecture: name its modules instead. Its modules are fc1, fc2, out."
    )
    assert "roles" not in message(model, "fc3")


def test_a_long_list_of_modules_is_cut():
    told = message(nested(*(f"body.layer_{number}" for number in range(30))), "q")
    assert told.endswith("layer_18, layer_19, ….")


def test_a_layer_cannot_be_adapted_whole_and_by_slice():
    told = message(build("gpt2"), "q", "c_attn", "v")
    assert "'c_attn' names transformer.h.0.attn.c_attn as a whole and" in told
    assert told.endswith("name either the layer or its slices.")


def test_a_slice_of_a_whole_layer_cannot_be_excluded():
    told = message(build("gpt2"), "c_attn", exclude=("k",))
    assert (
        "'c_attn' names transformer.h.0.attn.c_attn as a whole and exclude names its slice" in told
    )


@pytest.mark.parametrize(
    ("words", "settings", "told"),
    [
        (("embed",), {"layers": "0"}, "nothing of 'embed' is left after layers '0'."),
        (("q",), {"exclude": ("q",)}, "nothing of 'q' is left after exclude."),
        (
            ("v", "q"),
            {"exclude": ("h.1.attn.c_attn[q]",), "layers": "1"},
            "nothing of 'q' is left after layers '1' and exclude.",
        ),
    ],
)
def test_a_word_of_which_nothing_is_left_is_an_error(words, settings, told):
    assert message(build("gpt2"), *words, **settings) == told


def test_the_setting_with_the_bad_word_is_named():
    with pytest.raises(TargetError, match=r"^rank_pattern: gpt2 has no layer called 'value'\."):
        targets_by_word(build("gpt2"), {"value": 4}, what="rank_pattern")


# Blocks and heads.


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("model.layers.11.mlp.up_proj", 11),
        ("encoder.block.3.layer.0.SelfAttention.q", 3),
        ("lm_head", None),
        ("deberta2.pooler", None),
    ],
)
def test_the_block_number_is_the_first_number_in_the_path(path, number):
    assert block_number(path) == number


@pytest.mark.parametrize("family", [*DECODERS, "t5"])
def test_language_models_have_no_task_head(family):
    assert task_heads(build(family)) == ()


@pytest.mark.parametrize(
    ("family", "head", "expected"),
    [
        ("bert", "ForSequenceClassification", ("classifier",)),
        ("bert", "ForTokenClassification", ("classifier",)),
        ("bert", "ForQuestionAnswering", ("qa_outputs",)),
        ("bert", "ForMaskedLM", ()),
        ("bert", "Model", ()),
        ("distilbert", "ForSequenceClassification", ("pre_classifier", "classifier")),
        ("distilbert", "ForMaskedLM", ()),
        ("deberta-v2", "ForSequenceClassification", ("pooler", "classifier")),
        ("electra", "ForMaskedLM", ()),
        ("electra", "Model", ()),
        ("roberta", "ForSequenceClassification", ("classifier",)),
        ("gpt2", "ForSequenceClassification", ("score",)),
        ("gpt2", "ForTokenClassification", ("classifier",)),
        ("gpt2", "Model", ()),
        ("llama", "ForSequenceClassification", ("score",)),
        ("llama", "ForQuestionAnswering", ("qa_outputs",)),
        ("opt", "ForSequenceClassification", ("score",)),
        ("t5", "ForSequenceClassification", ("classification_head",)),
        ("t5", "ForTokenClassification", ("classifier",)),
        ("t5", "ForQuestionAnswering", ("qa_outputs",)),
        ("t5", "Model", ()),
        ("t5", "EncoderModel", ()),
        ("vit", "ForImageClassification", ("classifier",)),
        ("vit", "Model", ()),
    ],
)
def test_task_heads_are_what_stands_beside_the_backbone(family, head, expected):
    model = build(family, head=head)
    assert task_heads(model) == expected


def test_a_plain_module_has_no_task_head():
    assert task_heads(nn.Sequential(nn.Linear(2, 2))) == ()
