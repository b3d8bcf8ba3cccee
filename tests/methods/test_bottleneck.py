"""Bottlenecks: what they compute and where, beside hooks written by hand in float64."""

import copy
import pickle

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.errors import AdapterFileError, ConfigError, MergeError, TargetError
from lorakit.methods.module_copy import TrainedCopy
from methods.bottleneck_reference import (
    BLOCKS,
    NONLINEARITIES,
    TINY,
    bottleneck,
    bottlenecks,
    changed_modules,
    gelu,
    hooked,
    of,
    relu,
)
from references import base_hash, outputs, randomise
from tiny_models import build, example_inputs


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
@sampled("family", TINY)
def test_each_variant_computes_its_formula_at_its_modules(family, settings, nonlinearity):
    model = build(family)
    inputs = example_inputs(model)
    paths = changed_modules(family, settings["variant"])
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


@sampled("family", TINY)
def test_beside_lora_the_bottleneck_reads_what_lora_made(family):
    model = build(family)
    inputs = example_inputs(model)
    base = copy.deepcopy(model)
    paths = changed_modules(family, "h")
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


@sampled("family", TINY)
@pytest.mark.parametrize("variant", ["h", "l"])
def test_a_row_sums_bottlenecks_by_what_each_adds_to_the_base(family, variant):
    model = build(family)
    inputs = example_inputs(model, rows=4)
    base, paths, tensors = copy.deepcopy(model), changed_modules(family, variant), {}
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
