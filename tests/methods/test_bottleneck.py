"""Bottlenecks: what they compute and where, beside hooks written by hand in float64."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    RobertaConfig,
)

import lorakit as lk
from covering import covering
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AdapterFileError, ConfigError, MergeError, TargetError
from lorakit.methods.bottleneck import BottleneckComponent
from lorakit.methods.module_copy import TrainedCopy
from lorakit.training.memory.activation_checkpointing import matmuls, narrow_matmuls, recomputing
from references import base_hash, checkpoint_blocks, outputs, randomise
from tiny_models import build, example_inputs

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "bert": "bert.encoder.layer"}
ATTENTION = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "bert": "attention.output.dense"}
MLP = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "bert": "output.dense"}
TINY = tuple(BLOCKS)
VARIANTS = ("h", "l", "p", "d")


def bottlenecks(plan):
    """The bottlenecks of a plan, without the norms that may be trained beside them."""
    return plan.of_kind(BottleneckComponent)


def places(family, variant, blocks=(0, 1)):
    """The modules that a variant of the paper changes, written down by hand."""
    ends = {
        "h": (f".{ATTENTION[family]}", f".{MLP[family]}"),
        "l": ("",),
        "p": (f".{MLP[family]}",),
        "d": (f".{MLP[family]}",),
    }[variant]
    return [f"{BLOCKS[family]}.{number}{end}" for number in blocks for end in ends]


def relu(x):
    return x * (x > 0)


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


NONLINEARITIES = {
    "relu": relu,
    "gelu": gelu,
    "tanh": torch.tanh,
    "silu": lambda x: x / (1 + (-x).exp()),
}


def bottleneck(h, tensors, path, nonlinearity):
    """What a bottleneck adds to h, by its formula."""
    t = {k.removeprefix(f"{path}.bottleneck."): v.double() for k, v in tensors.items()}
    x = h
    if "norm.weight" in t:
        centred = h - h.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = centred / spread * t["norm.weight"] + t["norm.bias"]
    return nonlinearity(x @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"]


def of(tensors, path):
    return {name: t for name, t in tensors.items() if name.startswith(f"{path}.bottleneck.")}


def hooked(model, paths, add):
    """The logits of a copy in float64 where `add(path, h)` comes to some outputs."""

    def hook(path, output):
        if isinstance(output, tuple):
            return (output[0] + add(path, output[0]), *output[1:])
        return output + add(path, output)

    plain = copy.deepcopy(model).double()
    for path in paths:
        plain.get_submodule(path).register_forward_hook(lambda m, i, o, path=path: hook(path, o))
    return lambda inputs: outputs(plain, inputs)


@pytest.mark.parametrize(
    ("settings", "nonlinearity"),
    [
        ({"variant": "h"}, "gelu"),
        ({"variant": "l"}, "relu"),
        ({"variant": "p"}, "relu"),
        ({"variant": "d"}, "relu"),
        ({"variant": "h", "layer_norm": True, "activation": "tanh"}, "tanh"),
        ({"variant": "l", "layer_norm": False, "activation": "silu"}, "silu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", TINY)
def test_each_variant_computes_its_formula_at_its_places(family, settings, nonlinearity):
    model = build(family)
    inputs = example_inputs(model)
    paths = places(family, settings["variant"])
    base = copy.deepcopy(model)
    plan = lk.attach(model, lk.BottleneckConfig(size=5, modules_to_save=(), **settings))
    assert [each.path for each in bottlenecks(plan)] == paths
    assert torch.equal(outputs(model, inputs), outputs(base, inputs))
    randomise(model)
    tensors = lk.extract(model).tensors
    add = NONLINEARITIES[nonlinearity]
    expected = hooked(base, paths, lambda path, h: bottleneck(h, of(tensors, path), path, add))
    found = outputs(model.double(), inputs)
    torch.testing.assert_close(found, expected(inputs), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, outputs(base, inputs).double(), atol=1e-3)


@pytest.mark.parametrize("family", TINY)
def test_beside_lora_the_bottleneck_reads_what_lora_made(family):
    model = build(family)
    inputs = example_inputs(model)
    base = copy.deepcopy(model)
    paths = places(family, "h")
    lora = lk.LoRAConfig(rank=2, targets=("o", "down"), modules_to_save=())
    lk.attach(model, [lora, lk.BottleneckConfig(size=5, modules_to_save=())])
    randomise(model)
    adapter = lk.extract(model)
    assert adapter.method == "lora+adapter-h"
    twin = copy.deepcopy(base).double()
    for site in adapter.sites:
        a, b = (adapter.tensors[f"{site.name}.lora_{x}"].double() for x in "ab")
        weight = twin.get_submodule(site.path).weight
        delta = (
            b @ a if weight.shape == (b.shape[0], a.shape[1]) and family != "gpt2" else (b @ a).T
        )
        weight.data += site.scale * delta
    expected = hooked(
        twin, paths, lambda path, h: bottleneck(h, of(adapter.tensors, path), path, gelu)
    )
    found = outputs(model.double(), inputs)
    torch.testing.assert_close(found, expected(inputs), rtol=1e-9, atol=1e-9)


def test_both_stacks_and_cross_attention_have_their_outputs_changed():
    model = build("t5")
    plan = lk.plan(model, lk.BottleneckConfig(size=4))
    block = "{}.block.{}.layer.{}.{}.{}"
    expected = []
    for number in (0, 1):
        expected += [
            block.format("encoder", number, 0, "SelfAttention", "o"),
            block.format("encoder", number, 1, "DenseReluDense", "wo"),
        ]
    for number in (0, 1):
        expected += [
            block.format("decoder", number, 0, "SelfAttention", "o"),
            block.format("decoder", number, 1, "EncDecAttention", "o"),
            block.format("decoder", number, 2, "DenseReluDense", "wo"),
        ]
    assert [each.path for each in bottlenecks(plan)] == expected
    whole = [each.path for each in bottlenecks(lk.plan(model, lk.BottleneckConfig(variant="l")))]
    assert whole == [f"{stack}.block.{n}" for stack in ("encoder", "decoder") for n in (0, 1)]


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


@pytest.mark.parametrize(
    ("family", "norms", "values"),
    [
        ("llama", ["input_layernorm", "post_attention_layernorm"], 32),
        ("gpt2", ["ln_1", "ln_2"], 64),
        ("bert", ["attention.output.LayerNorm", "output.LayerNorm"], 64),
    ],
)
def test_the_bases_norms_in_adapted_blocks_can_be_trained_as_copies(
    family, norms, values, tmp_path
):
    model = build(family)
    inputs = example_inputs(model)
    base, hashed = outputs(model, inputs), base_hash(model)
    config = lk.BottleneckConfig(size=4, layers="1", train_norms=True, modules_to_save=())
    plan = lk.attach(model, config)
    assert list(plan.copies) == [f"{BLOCKS[family]}.1.{norm}" for norm in norms]
    assert sum(each.parameters for each in plan.of_kind(TrainedCopy)) == 2 * values
    assert torch.equal(outputs(model, inputs), base)
    randomise(model)
    adapted = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    assert base_hash(model) == hashed
    lk.attach(model, lk.Adapter.load(tmp_path / "saved"))
    assert torch.equal(outputs(model, inputs), adapted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_defaults_are_those_of_the_variant_and_never_wider_than_the_layer(variant):
    config = lk.BottleneckConfig(variant=variant)
    wide = bottlenecks(lk.plan(build("llama", hidden_size=64), config))[0]
    assert wide.size == {"h": 16, "l": 32, "p": 32, "d": 48}[variant]
    assert wide.activation == ("gelu" if variant == "h" else "relu")
    assert wide.layer_norm == (variant == "l")
    slim = bottlenecks(lk.plan(build("llama"), config))[0]
    assert slim.size == min(32, wide.size)


def test_down_starts_as_wide_as_lora_a_and_up_at_zero():
    model = build("llama")
    torch.manual_seed(0)
    lk.attach(model, lk.BottleneckConfig(variant="l", size=8))
    for name, tensor in lk.extract(model).tensors.items():
        if name.endswith("down.weight"):
            assert 0.9 / 32**0.5 < tensor.abs().max() <= 1 / 32**0.5
        else:
            assert torch.equal(tensor, torch.full_like(tensor, float("norm.weight" in name)))


def test_a_bfloat16_base_is_unchanged_at_the_start_and_reads_float32_tensors():
    model = build("llama").bfloat16()
    layer = model.model.layers[0].mlp.down_proj
    inputs = example_inputs(model)
    base = outputs(model, inputs)
    x = torch.randn(3, 48).bfloat16()
    h = layer(x)
    lk.attach(model, lk.BottleneckConfig(variant="p", size=8))
    assert torch.equal(outputs(model, inputs), base)
    randomise(model)
    tensors = lk.extract(model).tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    path = "model.layers.0.mlp.down_proj"
    update = bottleneck(h.double(), of(tensors, path), path, relu)
    assert torch.equal(layer(x), h + update.bfloat16())


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("variant", ["h", "l"])
def test_a_row_blends_bottlenecks_by_what_each_adds_to_the_base(family, variant):
    model = build(family)
    inputs = example_inputs(model, rows=4)
    base, paths, tensors = copy.deepcopy(model), places(family, variant), {}
    for seed, name in enumerate("ab"):
        config = lk.BottleneckConfig(variant=variant, size=3 + seed, modules_to_save=())
        lk.attach(model, config, name=name)
        randomise(model, name, seed=seed)
        tensors[name] = lk.extract(model, name).tensors
    add = gelu if variant == "h" else relu
    model.double()
    combinations = [{"a": 1.0}, {"b": 0.5}, {"a": 0.25, "b": 2.0}, {}]
    with lk.route(model, ["a", {"b": 0.5}, {"a": 0.25, "b": 2.0}, None]):
        found = outputs(model, inputs)
    for row, combination in enumerate(combinations):

        def update(path, h, combination=combination):
            each = [
                w * bottleneck(h, of(tensors[n], path), path, add) for n, w in combination.items()
            ]
            return sum(each, torch.zeros_like(h))

        alone = hooked(base, paths, update)({k: v[row : row + 1] for k, v in inputs.items()})
        torch.testing.assert_close(found[row], alone[0], rtol=1e-9, atol=1e-9)


def gradients(model, inputs, *, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in adapter_parameters(model, "default")}


# Torch says of the blocks below the adapted ones that they get no gradient, which is the aim.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@covering(
    ("family", "variant", "blocks", "reentrant"),
    itertools.product(TINY, ["h", "l"], [None, "1"], [False, True]),
)
def test_recomputed_blocks_drop_the_same_and_have_the_same_gradients(
    family, variant, blocks, reentrant
):
    model = build(family).double().train()
    inputs = example_inputs(model)
    lk.attach(
        model,
        lk.BottleneckConfig(
            variant=variant, size=8, dropout=0.5, layers=blocks, modules_to_save=()
        ),
    )
    randomise(model)
    expected = gradients(model, inputs)
    checkpoint_blocks(model, {"use_reentrant": reentrant})
    model.disable_input_require_grads()
    found = gradients(model, inputs)
    assert all(gradient.any() for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("worth", [narrow_matmuls, matmuls])
@pytest.mark.parametrize("variant", ["h", "l"])
def test_training_with_less_memory_has_the_same_gradients(variant, worth):
    model = build("llama").double().train()
    inputs = example_inputs(model)
    config = lk.BottleneckConfig(variant=variant, size=4, dropout=0.5)
    lk.attach(model, [lk.LoRAConfig(rank=2, targets=("o", "down")), config])
    randomise(model)
    expected = gradients(model, inputs)
    with recomputing(model, worth):
        for _ in range(2):
            for name, gradient in gradients(model, inputs).items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9)


def test_dropout_follows_the_seed_and_stops_in_eval_mode():
    model = build("llama")
    inputs = example_inputs(model)
    lk.attach(model, lk.BottleneckConfig(size=8, dropout=0.5))
    randomise(model)
    calm = outputs(model, inputs)
    model.train()
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(outputs(model, inputs))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(outputs(model.eval(), inputs), calm)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["h", "l"])
def test_generation_with_a_cache_writes_what_it_writes_without(family, variant):
    model = build(family)
    lk.attach(model, lk.BottleneckConfig(variant=variant, size=8))
    randomise(model, std=0.5)
    ids = example_inputs(model)["input_ids"]
    kept, again = (
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cache, eos_token_id=None)
        for cache in (True, False)
    )
    assert torch.equal(kept, again)
    with lk.route(model, None):
        assert not torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), kept)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_adapted_blocks_is_equal_and_independent(make):
    model = build("gpt2")
    inputs = example_inputs(model)
    lk.attach(model, lk.BottleneckConfig(variant="l"))
    randomise(model)
    adapted = outputs(model, inputs)
    twin = make(model)
    assert torch.equal(outputs(twin, inputs), adapted)
    randomise(twin, seed=1)
    assert torch.equal(outputs(model, inputs), adapted)


def test_hidden_states_that_are_asked_for_are_those_behind_the_bottleneck():
    model = build("llama")
    inputs = example_inputs(model)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
    lk.attach(model, lk.BottleneckConfig(variant="l"))
    base = model(**inputs, output_hidden_states=True).hidden_states
    randomise(model)
    found = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(found[0], base[0])
    assert not torch.allclose(found[1], base[1], atol=1e-3)


def test_a_bottleneck_cannot_be_merged_and_the_reason_is_said():
    model = build("llama")
    lk.attach(model, lk.BottleneckConfig())
    with pytest.raises(
        MergeError,
        match=r"'default' \(adapter-h\) cannot be merged, so it keeps its extra latency(.|\n)*"
        r"a bottleneck has a nonlinearity, which no weight can hold.*"
        r"first at model.layers.0.self_attn.o_proj",
    ):
        lk.merge(model)


class Net(torch.nn.Module):
    """A model of no known architecture."""

    def __init__(self):
        super().__init__()
        self.first, self.act = torch.nn.Linear(6, 4), torch.nn.ReLU()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4))

    def forward(self, x):
        return self.inner(self.act(self.first(x)))


def test_at_names_the_places_of_an_unknown_architecture():
    model = Net()
    x = torch.randn(2, 6)
    lk.attach(model, lk.BottleneckConfig(at=("first", "re:inner.0"), size=3))
    randomise(model)
    tensors = lk.extract(model).tensors
    assert set(tensors) == {
        f"{path}.bottleneck.{name}"
        for path in ("first", "inner.0")
        for name in ("down.weight", "down.bias", "up.weight", "up.bias")
    }
    model.double()
    with lk.route(model, None):
        h = model.first(x.double())
        add = bottleneck(h, of(tensors, "first"), "first", gelu)
        h = model.inner[0](torch.relu(h + add))
    expected = h + bottleneck(h, of(tensors, "inner.0"), "inner.0", gelu)
    torch.testing.assert_close(model(x.double()), expected, rtol=1e-9, atol=1e-9)


def test_at_a_module_without_parameters_what_it_hands_on_is_not_written_to():
    model = build("bert")
    inputs = example_inputs(model)
    where = ("bert.encoder.layer.0.output.dropout", "bert.embeddings.dropout")
    lk.attach(model, lk.BottleneckConfig(at=where, size=4, modules_to_save=()))
    randomise(model)
    seen = []
    for path in where:
        model.get_submodule(path).register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    outputs(model, inputs)
    assert len(seen) == 2
    assert all(given.ne(made).all() for given, made in seen)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda: build("llama"),
            {"size": 33},
            r"do not fit this model \(1 problem\):\n  size 33 is wider than the output of "
            r"model.layers.0.self_attn.o_proj, which has 32 values: use less$",
        ),
        (
            Net,
            {},
            r"^lorakit does not know the blocks of Net: name the modules whose output goes through "
            r"a bottleneck in bottleneck.at$",
        ),
        (
            lambda: build("llama"),
            {"variant": "d", "dropped": 2, "layers": "0-7"},
            r"adapter-d has no place in this model \(2 problems\):\n  dropped 2 leaves none of the "
            r"2 blocks of model.layers\n  layers '0-7' goes up to block 7, but there are 2 blocks, "
            r"counted from 0$",
        ),
        (
            lambda: build("llama", num_hidden_layers=12),
            {"variant": "d", "layers": "0-3"},
            r"layers '0-3' are all among the lowest blocks, left out here$",
        ),
        (lambda: build("llama"), {"at": ("x.*",)}, r"bottleneck.at: 'x.\*' names no module$"),
        (
            Net,
            {"at": ("inner",)},
            r"how wide the output of inner is cannot be told: name a linear layer$",
        ),
    ],
    ids=["wider", "unknown", "dropped", "left out", "no module", "no width"],
)
def test_what_a_model_lacks_is_one_message(make, settings, message):
    with pytest.raises(TargetError, match=message):
        lk.attach(make(), lk.BottleneckConfig(**settings))


def test_a_model_without_attention_outputs_has_no_place_for_adapter_h():
    model = build("gpt2")
    for block in model.transformer.h:
        block.attn.other, block.attn.c_proj = block.attn.c_proj, None
    with pytest.raises(
        TargetError,
        match=r"no attention output \(o\) is known in transformer.h.0, transformer.h.1: name the "
        r"modules whose output goes through a bottleneck in bottleneck.at",
    ):
        lk.plan(model, lk.BottleneckConfig())
    assert len(bottlenecks(lk.plan(model, lk.BottleneckConfig(variant="p")))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"variant": "h", "dropped": 1},
            "dropped goes with adapter-d alone, and this is adapter-h",
        ),
        (
            {"at": ("x",), "layers": "1", "train_norms": True},
            "at says exactly where bottlenecks are, so layers and train_norms can't be used",
        ),
        ({"size": 0}, "size: input should be greater than or equal to 1, found 0"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        lk.BottleneckConfig(**settings)


def test_a_bottleneck_inside_a_full_copy_is_refused():
    config = lk.BottleneckConfig(at=("model.layers.1.mlp.down_proj",), modules_to_save=("mlp",))
    with pytest.raises(
        TargetError, match=r"layers.1.mlp.* would be copied in full and adapted too"
    ):
        lk.plan(build("llama"), config)


def test_a_file_of_another_size_is_told_tensor_by_tensor(tmp_path):
    model = build("llama")
    lk.attach(model, lk.BottleneckConfig(variant="p", size=4, layers="0"))
    lk.extract(model).save(tmp_path / "saved")
    other = build("llama", hidden_size=16, seed=1)
    with pytest.raises(AdapterFileError, match=r"down_proj.bottleneck.up.weight  shape \(32, 4\)"):
        lk.attach(other, lk.Adapter.load(tmp_path / "saved"), allow_other_base=True)
