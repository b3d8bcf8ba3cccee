"""The role of each layer, by architecture; blocks and task heads."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.models.paths import block_number
from lorakit.models.roles import targets_of, task_heads
from lorakit.models.target_words import select_targets
from models.named_layers import names, nested, paths
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
