"""Tiny random models of every family that lorakit knows, built from their transformers configs."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 64
LENGTH = 7

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

STACKS = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
"""Settings of a tiny encoder and decoder, under the names of BART and its kin."""
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_ENCODER = {**_DECODER, "num_labels": 3}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEBERTA = {
    **_ENCODER,
    "relative_attention": True,
    "max_relative_positions": 8,
    "pos_att_type": ["p2c", "c2p"],
}

# Family: prefix of its classes in transformers, kind of head, keywords of its config.
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", _GROUPED),
    "mistral": ("Mistral", "ForCausalLM", _GROUPED),
    "qwen2": ("Qwen2", "ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3", "ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma": ("Gemma", "ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2", "ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "gemma3_text": ("Gemma3", "ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "smollm3": ("SmolLM3", "ForCausalLM", _GROUPED),
    "gpt2": ("GPT2", "LMHeadModel", _GPT),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", _DECODER),
    "gptj": ("GPTJ", "ForCausalLM", {**_GPT, "rotary_dim": 4}),
    "opt": (
        "OPT",
        "ForCausalLM",
        {**_DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16},
    ),
    "bloom": (
        "Bloom",
        "ForCausalLM",
        {**_DECODER, "n_layer": 2, "n_head": 4},
    ),
    "falcon": ("Falcon", "ForCausalLM", {**_DECODER, "ffn_hidden_size": 48}),
    "phi": ("Phi", "ForCausalLM", _DECODER),
    "phi3": ("Phi3", "ForCausalLM", _GROUPED),
    "bert": ("Bert", "ForSequenceClassification", _ENCODER),
    "roberta": ("Roberta", "ForSequenceClassification", _ENCODER),
    "xlm-roberta": ("XLMRoberta", "ForSequenceClassification", _ENCODER),
    "electra": ("Electra", "ForSequenceClassification", {**_ENCODER, "embedding_size": 16}),
    "deberta": ("Deberta", "ForSequenceClassification", _DEBERTA),
    "deberta-v2": ("DebertaV2", "ForSequenceClassification", _DEBERTA),
    "distilbert": (
        "DistilBert",
        "ForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 32,
            "num_labels": 3,
        },
    ),
    "t5": (
        "T5",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "vit": (
        "ViT",
        "ForImageClassification",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
            "num_labels": 3,
        },
    ),
}
FAMILIES: tuple[str, ...] = tuple(_RECIPES)
"""Names that `build` accepts: transformers' model types."""


def build(family: str, *, head: str | None = None, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model of the family: 2 blocks, width 32, eval mode.

    Args:
        family: One of `FAMILIES`.
        head: Ending of another transformers class than the usual one: "Model",
            "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", …
        seed: Seed of the weights; the caller's random state is left alone.
        overrides: Keywords of the family's config.

    Returns:
        A PreTrainedModel. It is typed as Any, since tests reach for the layers of its family.
    """
    prefix, usual_head, keywords = _RECIPES[family]
    config_prefix = "Gemma3Text" if family == "gemma3_text" else prefix
    config = getattr(transformers, f"{config_prefix}Config")(**{**keywords, **overrides})
    make = getattr(transformers, prefix + (head or usual_head))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config)
        _leave_no_zero_bias(model)
    return model.eval()


def example_inputs(model: Any, *, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A small valid batch for the model: token ids and a mask, or pixels; no labels."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    if config.model_type == "vit":
        shape = (rows, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, LENGTH), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 4), generator=generator)
    return batch


def _leave_no_zero_bias(model: PreTrainedModel) -> None:
    """Give biases random values, so that a test notices a bias that is lost or doubled."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)


def bart() -> transformers.BartForConditionalGeneration:
    """A random BART, whose encoder and decoder have two blocks each."""
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config)
