"""Quantised bases: what they compute, what adapters on them train, know and refuse."""

import copy
import importlib.util
import itertools
import logging
import pickle

import pytest
import torch
import transformers
from torch import nn

import lorakit as lk
import lorakit.cli.main as command_line
from covering import covering
from lorakit.attachment.plan import _check_float
from lorakit.config.train import TrainConfig
from lorakit.errors import (
    AdapterFileError,
    ConfigError,
    MergeError,
    MissingExtraError,
    ModelError,
    TargetError,
)
from lorakit.models.identity import identify
from lorakit.models.load import load_model
from lorakit.models.quantized import (
    Quantization,
    dequantize,
    quantization_of,
    quantize,
    quantized_within,
)
from lorakit.models.quantized_weight import float_weight, is_quantized
from lorakit.models.roles import output_head, task_heads
from lorakit.training.memory.compiled_blocks import check_compile
from lorakit.training.memory.memory_efficient import memory_efficient
from lorakit.training.memory.memory_setting import training_memory
from references import attach_random, outputs
from tiny_models import FAMILIES, build, example_inputs
from token_experts import made

WAYS = ("4bit", "8bit")
SOME = ("llama", "gpt2", "opt", "bert", "roberta", "deberta-v2")
# In `make test`: layers of other kinds and names than those of most families.
SHOWN = (*SOME, "t5", "vit", "gemma2", "bloom", "falcon", "phi3")


def quantized(family, way="4bit", *, double=True):
    """A tiny quantised model and its float original."""
    original = build(family)
    model = copy.deepcopy(original)
    quantize(model, Quantization.of(way, "float32", double=double))
    return model, original


def dequantized(model):
    twin = copy.deepcopy(model)
    dequantize(twin, torch.float32)
    return twin


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("llama", "8bit"),
        ("bert", "8bit"),
        *(
            pytest.param(each, "4bit", marks=() if each in SHOWN else pytest.mark.thorough)
            for each in FAMILIES
        ),
    ],
)
def test_a_quantised_model_computes_what_its_dequantised_copy_does(family, way):
    model, original = quantized(family, way)
    inputs = example_inputs(model)
    plain = dequantized(model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    assert not torch.equal(outputs(model, inputs), outputs(original, inputs))


@pytest.mark.parametrize("family", SOME)
def test_linear_layers_are_quantised_and_what_makes_logits_is_not(family):
    model, original = quantized(family)
    held = {path for path, layer in model.named_modules() if is_quantized(layer)}
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = {path for path, layer in original.named_modules() if isinstance(layer, kinds)}
    left = linear - held
    assert held
    heads = ("lm_head", "classifier", "pooler", "score")
    assert all(path.startswith(heads) for path in left if "bert." not in path)
    head = output_head(model)
    assert head is None or not is_quantized(head)
    floats = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in held or name.endswith("bias"):
            assert torch.equal(parameter, floats[name])


# A block of NF4 has 64 weights: rows of whole blocks, of parts of one, and sizes with a rest.
SHAPES = [(48, 128), (48, 32), (64, 96), (5, 100), (7, 30)]
WAYS = {"4bit": 0.12, "8bit": 0.01}
"""How much of a weight's norm may be lost."""


@covering(
    ("way", "shape", "double", "dtype"),
    itertools.product(WAYS, SHAPES, [True, False], ["float32", "bfloat16"]),
)
def test_a_weight_is_near_the_one_that_was_quantised(way, shape, double, dtype):
    check_error(way, shape, double, dtype)


# For rows of odd length bitsandbytes takes code of its own, which it has compiled by torch first.
@pytest.mark.thorough
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_with_rows_of_odd_length_is_near_the_one_that_was_quantised(way, double, dtype):
    check_error(way, (3, 33), double, dtype)


def check_error(way, shape, double, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    nn.init.normal_(layer.weight)
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, Quantization.of(way, dtype, double=double))
    error = float_weight(model[0]).float() - layer.weight
    assert float_weight(model[0]).dtype == getattr(torch, dtype)
    assert 0 < error.norm() / layer.weight.norm() < WAYS[way]


def test_a_float_layer_has_its_own_weight_as_float_weight():
    layer = nn.Linear(3, 4)
    assert float_weight(layer) is layer.weight


@pytest.mark.parametrize(
    ("family", "way", "memory"),
    [
        ("llama", "4bit", "balanced"),
        pytest.param("llama", "8bit", "low", marks=pytest.mark.thorough),
        pytest.param("gpt2", "4bit", "low", marks=pytest.mark.thorough),
        ("bert", "8bit", "fast"),
        # One of its weights is read by the model too.
        ("bloom", "4bit", "fast"),
    ],
)
def test_gradients_are_those_of_the_dequantised_base(family, way, memory):
    model, _ = quantized(family, way)
    plain = dequantized(model)
    inputs = example_inputs(model)
    settings = TrainConfig(out="unused", memory=memory)
    found = []
    for each in (model, plain):
        attach_random(each, rank=2, targets=("all-linear",), dropout=0.2)
        each.train()
        with training_memory(each, settings):
            gradients(each, inputs)
            found.append(gradients(each, inputs))
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 8
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [{"use_dora": True}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_forms_that_read_the_weight_read_the_dequantised_one(family, form):
    model, _ = quantized(family)
    plain = dequantized(model)
    inputs = example_inputs(model)
    for each in (model, plain):
        attach_random(each, rank=2, targets=("q", "v", "down"), **form)
    torch.testing.assert_close(outputs(model, inputs), outputs(plain, inputs))


def test_economical_modules_are_found_on_a_quantised_base():
    model, original = quantized("llama")
    for each in (model, original):
        attach_random(each, rank=2)
    with memory_efficient(model) as ours, memory_efficient(original) as theirs:
        assert ours == theirs
        assert any(path.endswith("mlp") for path in ours)


@pytest.mark.parametrize(("family", "way"), [("llama", "8bit"), *((each, "4bit") for each in SOME)])
def test_nothing_that_is_computed_changes_the_base(family, way):
    model, _ = quantized(family, way)
    inputs, before = example_inputs(model), state(model)
    answer = outputs(model, inputs)
    classes = [type(module) for module in model.modules()]
    attach_random(model, rank=2, targets=("all-linear",))
    model.train()
    model(**inputs).logits.square().sum().backward()
    model.eval()
    outputs(model, inputs)
    lk.detach(model)
    assert state(model).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(outputs(model, inputs), answer)


@pytest.mark.parametrize("way", WAYS)
def test_rows_choose_adapters_and_answer_as_if_alone(way):
    model, _ = quantized("llama", way)
    inputs = example_inputs(model)
    base = outputs(model, inputs)
    attach_random(model, rank=2, targets=("all-linear",))
    adapted = outputs(model, inputs)
    with lk.route(model, ["default", None]):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed[0], adapted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], base[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_equal_and_independent(make, way):
    model, _ = quantized("llama", way)
    inputs = example_inputs(model)
    attach_random(model, rank=2)
    adapted = outputs(model, inputs)
    twin = make(model)
    assert torch.equal(outputs(twin, inputs), adapted)
    layer = twin.get_submodule("model.layers.0.mlp.up_proj")
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(outputs(model, inputs), adapted)
    assert not torch.equal(outputs(twin, inputs), adapted)


@pytest.mark.parametrize("double", [True, False])
def test_a_quantised_base_says_how(double):
    model, original = quantized("llama", double=double)
    found = quantization_of(model)
    assert found == Quantization(bits=4, type="nf4", double=double, dtype="float32")
    assert quantization_of(quantized("llama", "8bit")[0]).bits == 8
    assert quantization_of(original) is None
    lk.attach(model, lk.LoRAConfig(rank=2))
    assert lk.extract(model).card == {
        "quantised": {"bits": 4, "type": "nf4", "double": double, "dtype": "float32"}
    }


def held_bytes(model):
    """The memory of all parameters, and of the scales of those that are quantised."""
    own = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    states = (getattr(p, "quant_state", None) for p in model.parameters())
    scales = (s.absmax for s in states if s is not None)
    return sum(own.values()) + sum(s.numel() * s.element_size() for s in scales)


@pytest.mark.thorough
def test_smollm2_takes_half_the_memory_in_4_bits_and_knows_its_original():
    model, _ = load_model("smollm2", dtype="bfloat16")
    before, original = held_bytes(model), identify(model)
    assert original is not None
    quantize(model, Quantization.of("4bit", "bfloat16"))
    # Its embedding, which is its head too, is a fifth of the weights.
    assert held_bytes(model) < 0.45 * before
    lk.attach(model, lk.LoRAConfig(rank=1))
    assert lk.extract(model).base.difference(original) is None


# Which base it is.


@pytest.mark.parametrize("family", SOME)
def test_an_adapter_of_a_quantised_base_fits_the_original_and_back(family, tmp_path):
    model, original = quantized(family)
    attach_random(model, rank=2, targets=("all-linear",))
    inputs = example_inputs(model)
    adapted = outputs(model, inputs)
    assert lk.extract(model).base == identify(original, skip=task_heads(original))
    lk.extract(model).save(tmp_path / "adapter")
    lk.detach(model)
    lk.attach(original, lk.Adapter.load(tmp_path / "adapter"))
    again = lk.extract(original)
    lk.attach(model, again)
    assert torch.equal(outputs(model, inputs), adapted)


def test_an_adapter_of_another_quantised_base_is_refused():
    model, _ = quantized("llama")
    lk.attach(model, lk.LoRAConfig(rank=2))
    other = build("llama", seed=1)
    with pytest.raises(AdapterFileError, match="sampled weights differ"):
        lk.attach(other, lk.extract(model))
    quantize(other, Quantization.of("4bit", "float32"))
    with pytest.raises(AdapterFileError, match="sampled weights differ"):
        lk.attach(other, lk.extract(model))


@pytest.fixture(
    params=[{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}]
)
def foreign(request, tiny_llama, tmp_path):
    """The folder of a checkpoint that transformers and bitsandbytes quantised."""
    config = transformers.BitsAndBytesConfig(**request.param)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "foreign")
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_a_checkpoint_that_another_tool_quantised_is_a_base_too(foreign, tiny_llama):
    model, _ = load_model(foreign, dtype="float32")
    assert quantization_of(model) is not None
    inputs, before = example_inputs(model), state(model)
    inputs["input_ids"] %= model.config.vocab_size
    attach_random(model, rank=2, targets=("all-linear",))
    assert gradients(model.train(), inputs)
    outputs(model.eval(), inputs)
    adapter = lk.extract(model)
    lk.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    original, _ = load_model(tiny_llama)
    lk.attach(original, adapter)
    lk.detach(original)
    lk.attach(original, lk.LoRAConfig(rank=2))
    lk.attach(model, lk.extract(original))
    with pytest.raises(AdapterFileError, match="sampled weights differ"):
        lk.attach(build("llama", seed=1), adapter)


# What cannot be done.


def test_merging_into_quantised_weights_is_refused_and_says_what_to_do():
    model, _ = quantized("llama")
    before = state(model)
    attach_random(model, rank=2)
    with pytest.raises(MergeError, match=r"quantised.*lorakit merge.*q_proj"):
        lk.merge(model)
    lk.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_what_the_refusal_says_to_do_works():
    model, _ = quantized("llama")
    inputs = example_inputs(model)
    attach_random(model, rank=2)
    adapted, adapter = outputs(model, inputs), lk.extract(model)
    with pytest.raises(ModelError, match="detach them"):
        dequantize(model, torch.float32)
    lk.detach(model)
    dequantize(model, torch.float32)
    lk.attach(model, adapter)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), adapted, rtol=1e-4, atol=1e-5)


def test_trained_biases_alone_are_merged():
    model, _ = quantized("bert")
    inputs = example_inputs(model)
    attach_random(model, rank=2, targets=("q",), bias="all")
    lk.detach(model)
    lk.attach(model, lk.BitFitConfig())
    lk.merge(model)
    lk.detach(model)
    assert outputs(model, inputs).isfinite().all()


def test_full_copies_of_quantised_weights_are_refused():
    model, _ = quantized("llama")
    settings = lk.LoRAConfig(rank=2, targets=("q",), modules_to_save=("mlp",))
    with pytest.raises(TargetError, match=r"mlp.*quantised.*without quantize"):
        lk.attach(model, settings)
    with pytest.raises(TargetError, match="the model would be copied"):
        _check_float(model, [""])


def test_a_saved_full_copy_does_not_fit_a_quantised_base():
    model, original = quantized("llama")
    lk.attach(original, lk.LoRAConfig(rank=2, targets=("q",), modules_to_save=("up_proj",)))
    with pytest.raises(AdapterFileError, match="which a quantised base can't be") as error:
        lk.attach(model, lk.extract(original))
    assert "(2 problems)" in str(error.value)


def test_heads_of_a_task_stay_trainable():
    model, _ = quantized("bert")
    plan = lk.attach(model, lk.LoRAConfig(rank=2, modules_to_save=("auto",)))
    assert plan.copies
    assert all(quantized_within(model.get_submodule(path)) is None for path in plan.copies)


def test_a_model_is_quantised_once_and_before_adapters():
    model, original = quantized("llama")
    four = Quantization.of("4bit", "float32")
    with pytest.raises(ModelError, match="already"):
        quantize(model, four)
    lk.attach(original, lk.LoRAConfig(rank=2))
    with pytest.raises(ModelError, match="quantise the base first"):
        quantize(original, four)
    with pytest.raises(ModelError, match="nothing to quantise"):
        quantize(nn.Sequential(nn.Embedding(3, 2)), four)
    with pytest.raises(ModelError, match="there are nf4 and int8"):
        quantize(build("llama"), Quantization(bits=4, type="fp4", double=False, dtype="float32"))


def test_an_unknown_way_is_refused(tiny_llama):
    with pytest.raises(ModelError, match="quantize '3bit' is none of 4bit, 8bit"):
        load_model(tiny_llama, quantize="3bit")


def test_a_missing_library_is_named_with_its_extra(monkeypatch, tiny_llama):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'lorakit\[quantized\]'"):
        load_model(tiny_llama, quantize="4bit")


def test_compiling_is_refused():
    with pytest.raises(ConfigError, match="not known to the compiler"):
        check_compile(TrainConfig(out="unused", compile=True, quantize="4bit"))


def test_a_command_line_drops_one_warning_of_the_library_and_no_other(monkeypatch, caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def run(line):
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: none")
        logger.warning("something else")
        return 0

    monkeypatch.setattr(command_line, "_run", run)
    assert command_line.main(["--help"]) == 0
    assert caplog.messages == ["something else"]
    assert not logger.filters


def test_layers_to_whose_precision_inputs_are_brought_stay_in_it():
    """Switch brings the input of `wo` to the precision of its weight, which integers truncate."""
    original = made("switch", torch.float32)
    model = copy.deepcopy(original)
    quantize(model, Quantization.of("4bit", "float32"))
    held = {path for path, layer in model.named_modules() if is_quantized(layer)}
    assert {path.rpartition(".")[2] for path in held} >= {"q", "wi"}
    assert not any(path.endswith(".wo") for path in held)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    plain, found = outputs(original, batch), outputs(model, batch)
    assert float((found - plain).norm() / plain.norm()) < 0.5
    # NLLB-MoE asks whether the weight has integers before it brings anything to them.
    model = made("nllb-moe", torch.float32)
    quantize(model, Quantization.of("4bit", "float32"))
    assert is_quantized(model.model.encoder.layers[0].ffn.experts["expert_0"].fc2)
