"""The paper's numbers of trained parameters, counted on models without memory."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    RobertaConfig,
)

import lorakit as lk

ROBERTA_BASE = RobertaConfig()
ROBERTA_LARGE = RobertaConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
DEBERTA_XXL = DebertaV2Config(
    hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
)
GPT2_MEDIUM = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
GPT3 = GPT2Config(n_embd=12288, n_layer=96, n_head=96)
MADE: dict[tuple[Any, int], Any] = {}
"""Models of this module's configs: a plan leaves them as they are."""


def made(kind, config):
    """The model of a config, made once, on the device without memory."""
    key = kind, id(config)
    if key not in MADE:
        with torch.device("meta"):
            MADE[key] = kind.from_config(config)
    return MADE[key]


@pytest.mark.parametrize(
    ("config", "rank", "targets", "count"),
    [
        (ROBERTA_BASE, 8, "q, v", 294_912),
        (ROBERTA_LARGE, 8, "q, v", 786_432),
        (DEBERTA_XXL, 16, "q, v", 4_718_592),
        # Table 3 prints 0.35M and 0.77M for these two; the formula of section 4.2 gives these.
        (GPT2_MEDIUM, 4, "q, v", 393_216),
        (GPT2_LARGE, 4, "q, v", 737_280),
        (GPT3, 1, "q, v", 4_718_592),
        (GPT3, 8, "q, v", 37_748_736),
        # Section 7.1: every choice costs the same 18M.
        (GPT3, 8, "q", 18_874_368),
        (GPT3, 8, "o", 18_874_368),
        (GPT3, 4, "q, k", 18_874_368),
        (GPT3, 2, "q, k, v, o", 18_874_368),
    ],
)
def test_parameter_counts_are_those_of_the_paper(config, rank, targets, count):
    generates = isinstance(config, GPT2Config)
    kind = AutoModelForCausalLM if generates else AutoModelForSequenceClassification
    model = made(kind, config)
    plan = lk.plan(model, lk.LoRAConfig(rank=rank, targets=targets, modules_to_save=()))
    assert plan.parameters == count
    width = getattr(config, "hidden_size", None) or config.n_embd
    assert count == 2 * len(plan.sites) * width * rank  # 2·L̂·d_model·r


@pytest.mark.parametrize(
    ("kind", "config", "method", "count", "printed"),
    [
        # Table 3.
        (AutoModelForCausalLM, GPT2_MEDIUM, lk.FullConfig(only_top=True), 25_192_448, 25.19),
        # Table 2; the pooler's 768 are among them.
        (AutoModel, ROBERTA_BASE, lk.BitFitConfig(), 102_912, 0.1),
        # Table 4.
        (AutoModelForCausalLM, GPT3, lk.PrefixConfig(prefix=256, infix=8), 3_244_032, 3.2),
    ],
)
def test_other_methods_have_the_paper_s_counts(kind, config, method, count, printed):
    model = made(kind, config)
    parameters = lk.plan(model, method.model_copy(update={"modules_to_save": ()})).parameters
    digits = len(str(printed).partition(".")[2])
    assert (parameters, round(parameters / 1e6, digits)) == (count, printed)


@pytest.mark.parametrize(
    ("config", "printed"), [(GPT2_MEDIUM, 0.35), (GPT2_LARGE, 0.77), (GPT3, 20.2)]
)
def test_no_number_of_tokens_gives_the_paper_s_counts_of_prelayer(config, printed):
    # L·d·(l_p + l_i) with whole l_p + l_i: Tables 3 and 4 must have counted something more.
    model = made(AutoModelForCausalLM, config)
    digits = len(str(printed).partition(".")[2])
    counts = {
        lk.plan(model, lk.PrefixConfig(every_layer=True, prefix=n, infix=0)).parameters
        for n in range(10, 20)
    }
    assert min(counts) < printed * 1e6 < max(counts)
    assert printed not in {round(count / 1e6, digits) for count in counts}


def test_the_scale_is_alpha_over_rank_or_its_root():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for use_rslora, scale in ((False, 32 / 4), (True, 32 / 2)):
        config = lk.LoRAConfig(rank=4, alpha=32, targets=("0",), use_rslora=use_rslora)
        assert lk.plan(layer, config).sites[0].scale == scale
    assert lk.plan(layer, lk.LoRAConfig(rank=4, targets=("0",))).sites[0].scale == 1.0
