"""The paper's models as shapes without weights, on which its parameters are counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

from lorakit.attachment.plan import fresh_plan
from lorakit.config.train import TrainConfig
from lorakit.models.packaged import PACKAGES, packaged_folder

GPT3 = "gpt3"
"""GPT-3 175B, which can be counted and not be had."""
_ROBERTA: dict[str, Any] = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_DEBERTA: dict[str, Any] = {
    "hidden_size": 1536,
    "num_hidden_layers": 48,
    "num_attention_heads": 24,
    "intermediate_size": 6144,
    "type_vocab_size": 0,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 256,
    "share_att_key": True,
    "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "conv_act": "gelu",
}
SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "roberta-base": lambda: RobertaConfig(**_ROBERTA),
    "roberta-large": lambda: RobertaConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        **_ROBERTA,
    ),
    "deberta-xxlarge": lambda: DebertaV2Config(**_DEBERTA),
    "gpt2-medium": lambda: GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": lambda: GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    GPT3: lambda: GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048),
}
"""The configuration of each published model."""


@cache
def model_of(name: str) -> PreTrainedModel:
    """A model without a task's head, and without memory for its weights.

    Args:
        name: a published model, or one that `lorakit train` can load from this machine.
    """
    if name in SHAPES:
        config = SHAPES[name]()
    else:
        source = packaged_folder(name) if name in PACKAGES else name
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    writes = any("CausalLM" in each for each in config.architectures or ())
    kind: Any = AutoModelForCausalLM if writes or isinstance(config, GPT2Config) else AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config)
    return model


def trained_parameters(name: str, config: TrainConfig) -> int:
    """The number of values that a run trains, without a head, which the paper does not count.

    Args:
        name: its model, as `model_of` takes it.
        config: its settings.
    """
    methods = [each.model_copy(update={"modules_to_save": ()}) for each in config.methods()]
    return fresh_plan(model_of(name), methods).parameters


def all_parameters(name: str) -> int:
    """The number of values of a model, without a task's head."""
    return model_of(name).num_parameters()
