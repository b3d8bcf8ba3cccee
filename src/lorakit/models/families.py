"""The architectures: names of their layers, and how several layers share one fused matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorakit.models.base import base_modules
from lorakit.models.multihead import IN_PROJ, is_multihead
from lorakit.models.paths import ends_with
from lorakit.models.reads import read_weights
from lorakit.upstream.private_names import own_parameters

Widths = tuple[tuple[str, int], ...]
"""Roles and their numbers of output rows, in the order in which they repeat down a fused matrix."""

RowSplit = Callable[[Any, int], Widths]
"""From the model's config and the fused matrix's number of output rows to its widths."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The layer names of one architecture; where several ends match a path, the longest counts."""

    roles: Mapping[str, str]
    """End of a module's path: its role."""

    fused: Mapping[str, RowSplit] = field(default_factory=dict)
    """End of a fused projection's path: how its output rows are divided."""

    uncalled: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """End of a module's path: its parameters that the model uses without calling the module, beyond
    those that `models/reads.py` finds."""

    shared_by_batch: tuple[str, ...] = ()
    """Ends of the paths of layers whose input is shared by the batch: it has no row per sample."""

    experts: str = ""
    """End of the path of a module that gives each of its children, the experts, those tokens that
    chose it; "": there is none."""

    of_each_expert: Mapping[str, str] = field(default_factory=dict)
    """End of a layer's path within such an expert: its role."""


def equal_parts(*roles: str) -> RowSplit:
    """A split into blocks of equal height, one after the other."""

    def split(_config: Any, rows: int) -> Widths:
        return tuple((role, rows // len(roles)) for role in roles)

    return split


def _per_head(config: Any, _rows: int) -> Widths:
    """The split of BLOOM and GPT-NeoX: q, k and v of each head, one head after the other."""
    size = config.hidden_size // config.num_attention_heads
    return (("q", size), ("k", size), ("v", size))


def _falcon(config: Any, rows: int) -> Widths:
    """The split of Falcon: the q heads that share a k and a v, then that k, then that v."""
    size = config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        shared_by = config.num_attention_heads // config.num_kv_heads
    elif config.multi_query:
        shared_by = config.num_attention_heads
    else:
        return _per_head(config, rows)
    return (("q", shared_by * size), ("k", size), ("v", size))


def _phi3(config: Any, rows: int) -> Widths:
    """The split of Phi-3: all q heads, then all k heads, then all v heads."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = rows // (heads + 2 * kv_heads)
    return (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size))


_LLAMA = Family(
    roles={
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate_proj": "gate",
        "mlp.up_proj": "up",
        "mlp.down_proj": "down",
    }
)

# Of their experts `models/experts.py` knows the roles.
_LLAMA_WITH_EXPERTS = Family(
    roles={
        **_LLAMA.roles,
        "shared_expert.gate_proj": "gate",
        "shared_expert.up_proj": "up",
        "shared_expert.down_proj": "down",
    }
)

_GPT2 = Family(
    roles={
        "attn.c_proj": "o",
        "crossattention.q_attn": "q",
        "crossattention.c_proj": "o",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    fused={
        "attn.c_attn": equal_parts("q", "k", "v"),
        "crossattention.c_attn": equal_parts("k", "v"),
    },
)

_GPT_NEOX = Family(
    roles={
        "attention.dense": "o",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
    fused={"attention.query_key_value": _per_head},
)

_GPTJ = Family(
    roles={
        "attn.q_proj": "q",
        "attn.k_proj": "k",
        "attn.v_proj": "v",
        "attn.out_proj": "o",
        "mlp.fc_in": "up",
        "mlp.fc_out": "down",
    }
)

_OPT = Family(
    roles={
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.out_proj": "o",
        "fc1": "up",
        "fc2": "down",
    }
)

# Its encoder's output is read by one more attention of each of the decoder's blocks.
_BART = Family(
    roles={
        **_OPT.roles,
        "encoder_attn.q_proj": "q",
        "encoder_attn.k_proj": "k",
        "encoder_attn.v_proj": "v",
        "encoder_attn.out_proj": "o",
    }
)

_BLOOM_ROLES = {
    "self_attention.dense": "o",
    "mlp.dense_h_to_4h": "up",
    "mlp.dense_4h_to_h": "down",
}

_PHI = Family(
    roles={
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.dense": "o",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    }
)

_PHI3 = Family(
    roles={"self_attn.o_proj": "o", "mlp.down_proj": "down"},
    fused={"self_attn.qkv_proj": _phi3, "mlp.gate_up_proj": equal_parts("gate", "up")},
)

_BERT_OUTPUTS = {
    "attention.output.dense": "o",
    "crossattention.output.dense": "o",
    "intermediate.dense": "up",
    "output.dense": "down",
}

_BERT = Family(
    roles={**_BERT_OUTPUTS, "self.query": "q", "self.key": "k", "self.value": "v"},
)

_DISTILBERT = Family(
    roles={
        "attention.q_lin": "q",
        "attention.k_lin": "k",
        "attention.v_lin": "v",
        "attention.out_lin": "o",
        "ffn.lin1": "up",
        "ffn.lin2": "down",
    }
)

_T5 = Family(
    roles={
        **{
            f"{attention}.{role}": role
            for attention in ("SelfAttention", "EncDecAttention")
            for role in ("q", "k", "v", "o")
        },
        "DenseReluDense.wi": "up",
        "DenseReluDense.wi_0": "gate",
        "DenseReluDense.wi_1": "up",
        "DenseReluDense.wo": "down",
    },
    shared_by_batch=("SelfAttention.relative_attention_bias",),
)

# Its experts are the same layers once more.
_SWITCH = Family(
    roles={
        **_T5.roles,
        "mlp.wi": "up",
        "mlp.wo": "down",
    },
    shared_by_batch=_T5.shared_by_batch,
    experts="mlp.experts",
    of_each_expert={"wi": "experts.up", "wo": "experts.down"},
)

_NLLB_MOE = Family(
    roles={
        **{
            f"{attention}.{leaf}": role
            for attention in ("self_attn", "cross_attention")
            for leaf, role in {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "o"}.items()
        },
        "ffn.fc1": "up",
        "ffn.fc2": "down",
    },
    experts="ffn.experts",
    of_each_expert={"fc1": "experts.up", "fc2": "experts.down"},
)

# transformers renamed ViT's layers within version 5: both sets of names are in use.
_VIT = Family(
    roles={
        **_BERT_OUTPUTS,
        "attention.attention.query": "q",
        "attention.attention.key": "k",
        "attention.attention.value": "v",
        "attention.q_proj": "q",
        "attention.k_proj": "k",
        "attention.v_proj": "v",
        "attention.o_proj": "o",
        "mlp.fc1": "up",
        "mlp.fc2": "down",
    }
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _LLAMA_WITH_EXPERTS),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "gptj": _GPTJ,
    "opt": _OPT,
    "bloom": Family(roles=_BLOOM_ROLES, fused={"self_attention.query_key_value": _per_head}),
    "falcon": Family(roles=_BLOOM_ROLES, fused={"self_attention.query_key_value": _falcon}),
    "phi": _PHI,
    "phi3": _PHI3,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta": Family(
        roles=_BERT_OUTPUTS,
        fused={"self.in_proj": _per_head},
        uncalled={"encoder.rel_embeddings": ("weight",), "attention.self": ("q_bias", "v_bias")},
        shared_by_batch=(
            "encoder.rel_embeddings",
            "attention.self",
            "self.pos_proj",
            "self.pos_q_proj",
        ),
    ),
    "deberta-v2": Family(
        roles={
            **_BERT_OUTPUTS,
            "self.query_proj": "q",
            "self.key_proj": "k",
            "self.value_proj": "v",
        },
        uncalled={"encoder.rel_embeddings": ("weight",)},
        shared_by_batch=(
            "encoder.rel_embeddings",
            "encoder.LayerNorm",
            "self.pos_key_proj",
            "self.pos_query_proj",
        ),
    ),
    "distilbert": _DISTILBERT,
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot"), _BART),
    "switch_transformers": _SWITCH,
    "nllb-moe": _NLLB_MOE,
    "vit": _VIT,
}
"""transformers' `config.model_type`: the architecture's layer names."""

UNKNOWN_FAMILY = Family(roles={})
"""The family of an architecture that is not in the table."""


def family_of(model: nn.Module) -> Family:
    """The family of a model's architecture."""
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), UNKNOWN_FAMILY)


def family_name(model: nn.Module) -> str:
    """A model's name for messages: its model type, else its class."""
    return getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__


def uncalled_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters that are read without a module call, by their module's path.

    DeBERTa's relative positions are the weight of an embedding that is never called.
    """
    ends = family_of(model).uncalled
    found = read_weights(model)
    for path, module in base_modules(model) if ends else ():
        for end, names in ends.items():
            own = tuple(name for name in names if own_parameters(module).get(name) is not None)
            if own and ends_with(path, end):
                found[path] = own
    return found


def weights_read_inside(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters that their own module reads and LoRA can adapt, by the module's path."""
    return {path: (IN_PROJ,) for path, module in base_modules(model) if is_multihead(module)}
