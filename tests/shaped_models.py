"""Tiny models that change their logits behind the head, as Gemma, Cohere and Granite do."""

import torch
import transformers

from tiny_models import FAMILIES, VOCABULARY, build

SHAPED = {
    "gemma2": {"final_logit_softcapping": 0.1},
    "gemma3_text": {"final_logit_softcapping": 0.3},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
}


def with_shaped_logits(family, **overrides):
    """A model of the family whose logits are not what its head answers.

    Args:
        family: one of `SHAPED`.
        overrides: keywords of its config.
    """
    options = SHAPED[family] | overrides
    if family in FAMILIES:
        return build(family, **options)
    name = family.capitalize()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()
