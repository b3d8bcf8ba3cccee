"""Tiny random models with experts, each of whose weights are parameters of three dimensions."""

from typing import Any

import torch
import transformers

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}

# Model type: prefix of its classes, keywords of its config.
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
    ),
    "llama4_text": (
        "Llama4",
        {"num_local_experts": 4, "intermediate_size_mlp": 24, "head_dim": 8},
    ),
}
MIXTURES: tuple[str, ...] = tuple(_RECIPES)
"""Names that `mixture` accepts: transformers' model types."""


def mixture(family: str, *, seed: int = 0) -> Any:
    """A tiny random model with experts in eval mode; typed as Any, as `tiny_models.build` is."""
    prefix, keywords = _RECIPES[family]
    config_class = "Llama4TextConfig" if family == "llama4_text" else f"{prefix}Config"
    config = getattr(transformers, config_class)(**{**_SIZES, **keywords})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        for parameter in model.parameters():
            # Some start at zero, and are filled from a checkpoint.
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()
