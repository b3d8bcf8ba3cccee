"""Which blocks have bottlenecks, how wide they are, and the paper's parameter counts."""

import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    RobertaConfig,
)

import lorakit as lk
from lorakit.methods.module_copy import TrainedCopy
from methods.bottleneck_reference import VARIANTS, bottlenecks
from tiny_models import build


def test_dropped_blocks_are_the_lowest_ones_of_each_stack():
    def numbers(model, **settings):
        plan = lk.plan(model, lk.BottleneckConfig(variant="d", size=2, **settings))
        return [int(each.path.split(".")[2]) for each in bottlenecks(plan)]

    llama = build("llama", num_hidden_layers=12)
    assert numbers(llama) == [5, 6, 7, 8, 9, 10, 11]
    assert numbers(llama, dropped=10) == [10, 11]
    assert numbers(llama, dropped=0) == list(range(12))
    assert numbers(llama, layers="3-6") == [5, 6]
    assert numbers(build("t5", num_layers=5, num_decoder_layers=3)) == [2, 3, 4, 1, 2]


CONFIGS = {
    "RoBERTa-base": RobertaConfig(),
    "RoBERTa-large": RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "GPT-2 M": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "GPT-2 L": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "GPT-3": GPT2Config(n_embd=12288, n_layer=96, n_head=96),
}


@functools.cache
def without_memory(name):
    writes = name.startswith("GPT")
    kind = AutoModelForCausalLM if writes else AutoModelForSequenceClassification
    with torch.device("meta"):
        return kind.from_config(CONFIGS[name])


def count(name, **settings):
    model = without_memory(name)
    plan = lk.plan(model, lk.BottleneckConfig(modules_to_save=(), **settings))
    found = bottlenecks(plan)
    norms = sum(each.layer_norm for each in found)
    width, size = found[0].width, found[0].size
    # L̂_adpt·(2·d·r + r + d) + 2·L̂_LN·d
    formula = len(found) * (2 * width * size + size + width) + 2 * norms * width
    copies = sum(each.parameters for each in plan.of_kind(TrainedCopy))
    assert plan.parameters == formula + copies
    return plan.parameters


@pytest.mark.parametrize(
    ("model", "variant", "size", "parameters", "printed"),
    [
        # Table 2. Its counts for Adapter^D are those of all twelve blocks.
        ("RoBERTa-base", "p", 48, 894_528, 0.9),
        ("RoBERTa-base", "p", 16, 304_320, 0.3),
        ("RoBERTa-large", "p", 60, 2_975_136, 3.0),
        ("RoBERTa-large", "p", 16, 811_392, 0.8),
        ("RoBERTa-large", "h", 60, 5_950_272, 6.0),
        ("RoBERTa-large", "h", 8, 835_968, 0.8),
        # Table 3.
        ("GPT-2 M", "l", 224, 11_089_152, 11.09),
        ("GPT-2 M", "l", 6, 368_784, 0.37),
        ("GPT-2 L", "l", 248, 23_002_848, 23.00),
        ("GPT-2 L", "l", 8, 875_808, 0.88),
        # Table 4.
        ("GPT-3", "h", 1, 7_078_080, 7.1),
        ("GPT-3", "h", 8, 40_109_568, 40.1),
    ],
)
def test_parameter_counts_are_those_of_the_paper(model, variant, size, parameters, printed):
    assert count(model, variant=variant, size=size) == parameters
    digits = len(str(printed).partition(".")[2])
    assert round(parameters / 1e6, digits) == printed


def test_adapter_h_of_gpt2_medium_cannot_have_the_count_that_is_printed():
    # Table 3 prints 11.09M for Adapter^H; with 48 bottlenecks one value more of the inner width is
    # 0.1M, and no width gives 11.09M, with the norms' 0.1M or without.
    assert count("GPT-2 M", variant="h", size=112) == 11_064_576
    for norms in (False, True):
        counts = {count("GPT-2 M", variant="h", size=r, train_norms=norms) for r in (111, 112, 113)}
        assert 11.09 not in {round(found / 1e6, 2) for found in counts}


def test_adapter_d_by_itself_has_seven_of_twelve_blocks():
    assert count("RoBERTa-base", variant="d", size=48) == 894_528 * 7 // 12
    assert count("RoBERTa-base", variant="d", size=48, dropped=0) == 894_528


@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_are_those_of_the_variant_and_never_wider_than_the_layer(variant):
    config = lk.BottleneckConfig(variant=variant)
    wide = bottlenecks(lk.plan(build("llama", hidden_size=64), config))[0]
    assert wide.size == {"h": 16, "l": 32, "p": 32, "d": 48}[variant]
    assert wide.activation == ("gelu" if variant == "h" else "relu")
    assert wide.layer_norm == (variant == "l")
    slim = bottlenecks(lk.plan(build("llama"), config))[0]
    assert slim.size == min(32, wide.size)
