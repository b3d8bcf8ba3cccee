"""Tiny random models with experts as Linear modules, each given the tokens that chose it."""

import torch
import transformers
from torch import nn

from tiny_models import STACKS

FAMILIES = ("switch", "nllb-moe")


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=3,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe():
    config = transformers.NllbMoeConfig(
        **STACKS,
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        dropout=0.0,
        attention_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        moe_token_dropout=0.0,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def made(family, dtype=torch.float64):
    """A tiny random model in eval mode, without noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"switch": switch, "nllb-moe": nllb_moe}[family]()
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.dtype = dtype
    return model.to(dtype).eval()


def inputs(rows, length=6):
    """A batch of rows."""
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
