"""DoRA against rows of W₀ + scale·B·A that are given their lengths one by one, in float64."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.attachment.state import attachment_of
from lorakit.errors import AdapterFileError
from lorakit.kernels.choice import use
from references import alone, attach_random, base_hash, outputs, randomise
from tiny_models import build, example_inputs


class One(nn.Module):
    """A model of one layer."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def weight_of(weight, adapter, site, tensors):
    """m·(W₀ + scale·B·A)/‖W₀ + scale·B·A‖ with the norm as a constant, row by row."""
    a, b, m = (tensors[f"{site.name}.lora_{end}"] for end in ("a", "b", "magnitude"))
    ranges = site.rows or ((0, len(weight)),)
    rows = [row for start, stop in ranges for row in range(start, stop)]
    changed = weight.clone()
    for number, row in enumerate(rows):
        v = weight[row] + site.scale * (b[number] @ a)
        changed[row] = m[number] * v / v.norm().detach()
    return changed


def with_lengths(model: nn.Module) -> nn.Module:
    """A plain float64 copy of a model with DoRA in its weights."""
    adapter, plain = lk.extract(model), copy.deepcopy(model)
    lk.detach(plain)
    plain.double()
    tensors = {name: tensor.double() for name, tensor in adapter.tensors.items()}
    own = dict(plain.named_parameters())
    for name in own.keys() & tensors.keys():
        own[name].data = tensors[name]
    for site in adapter.sites:
        layer: Any = plain.get_submodule(site.path)
        turned = isinstance(layer, Conv1D | nn.Embedding)
        weight = layer.weight.detach().T if turned else layer.weight.detach()
        changed = weight_of(weight, adapter, site, tensors)
        layer.weight = nn.Parameter(changed.T if turned else changed)
    return plain


LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "no bias": lambda: nn.Linear(7, 5, bias=False),
    "transposed": lambda: Conv1D(5, 7),
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {"targets": ("all-linear",)},
    "gpt2": {"targets": ("q", "v", "down"), "bias": "lora", "use_rslora": True},
    "gpt_neox": {"targets": ("k", "v"), "rank_pattern": {"v": 2}},
    "bert": {"targets": ("q", "o", "word_embeddings")},
    "gemma": {"targets": ("embed", "down")},
}


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("bias", ["none", "lora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_has_rows_of_the_trained_lengths(kind, bias, kernels):
    if kind == "no bias" and bias == "lora":
        return
    torch.manual_seed(0)
    model = One(LAYERS[kind]())
    attach_random(model, targets=("layer",), rank=3, alpha=5, use_dora=True, bias=bias)
    x = torch.randn(2, 4, 7)
    exact = with_lengths(model)(x.double()).float()
    with use(kernels):
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_a_model_equals_one_with_such_weights_in_float64(family):
    model = build(family).double()
    before = base_hash(model)
    attach_random(model, use_dora=True, rank=3, **TINY[family])
    inputs = example_inputs(model)
    exact = outputs(with_lengths(model), inputs)
    # A and B are float32, and so is the factor on the rows.
    torch.testing.assert_close(outputs(model, inputs), exact, rtol=1e-5, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(outputs(model, inputs), exact, rtol=1e-5, atol=1e-5)
    lk.detach(model)
    assert base_hash(model) == before


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_gradients_take_the_norm_as_a_constant(kernels):
    torch.manual_seed(0)
    model = One(nn.Linear(7, 5)).double()
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=3, alpha=5, use_dora=True))
    randomise(model)
    model.layer.adapter_bank.double()
    adapter = lk.extract(model)
    tensors = {name: t.clone().requires_grad_() for name, t in adapter.tensors.items()}
    weight = model.layer.weight.detach()
    x = torch.randn(2, 4, 7).double()
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    changed = weight_of(weight, adapter, adapter.sites[0], tensors)
    (other @ changed.T + model.layer.bias.detach()).square().sum().backward()
    with use(kernels):
        model.train()(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    for name, parameter in adapter_parameters(model, "default"):
        torch.testing.assert_close(parameter.grad, tensors[name].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TINY)
def test_nothing_changes_at_the_start_not_even_a_bit(family, dtype):
    model = build(family).to(dtype)
    inputs = example_inputs(model)
    before = outputs(model, inputs)
    lk.attach(model, lk.LoRAConfig(use_dora=True, **TINY[family]))
    assert torch.equal(outputs(model, inputs), before)


def test_dropout_leaves_the_base_s_part_alone():
    torch.manual_seed(0)
    model = One(nn.Linear(40, 3))
    x = torch.randn(2, 40)
    before = model(x)
    lk.attach(model, lk.LoRAConfig(targets=("layer",), dropout=0.5, use_dora=True))
    model.train()
    assert torch.equal(model(x), before)
    randomise(model)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_with_dora_beside_others_answer_as_if_alone(family):
    model = build(family)
    inputs = example_inputs(model, rows=4)
    attach_random(model, "dora", use_dora=True, **TINY[family])
    attach_random(model, "lora", seed=1, targets=("q", "v"))
    names = ["dora", None, "lora", {"dora": 0.5, "lora": 2.0}]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    for row, expected in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-5)


def test_a_strength_is_a_share_of_the_change():
    model = One(nn.Linear(7, 5))
    attach_random(model, "dora", targets=("layer",), use_dora=True)
    x = torch.randn(2, 7)
    whole = model(x)
    with lk.route(model, None):
        base = model(x)
    with lk.route(model, {"dora": 0.25}):
        torch.testing.assert_close(model(x), base + 0.25 * (whole - base))


def test_lengths_that_were_kept_follow_the_weights():
    model = One(nn.Linear(7, 5))
    attach_random(model, targets=("layer",), use_dora=True)
    x = torch.randn(2, 7)
    with torch.no_grad():
        first, again = model(x), model(x)
        assert torch.equal(first, again)
        twin = copy.deepcopy(model)
        for changed in (model, twin):
            changed.layer.adapter_bank["@default"].parts["whole"].lora_b.mul_(3)
            exact = with_lengths(changed)(x.double()).float()
            torch.testing.assert_close(changed(x), exact, rtol=1e-5, atol=1e-5)
        model.layer.weight.mul_(0.5)
        exact = with_lengths(model)(x.double()).float()
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)


def test_a_row_of_zeros_stays_finite():
    model = One(nn.Linear(7, 5, bias=False))
    with torch.no_grad():
        model.layer.weight[2] = 0
    lk.attach(model, lk.LoRAConfig(targets=("layer",), use_dora=True))
    assert torch.isfinite(model(torch.randn(3, 7))).all()


CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=2, bias=False), (2, 4, 9, 8)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
    "3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
}


def convolved(kind):
    """A model of one convolution, and an input."""
    make, shape = CONVOLUTIONS[kind]
    torch.manual_seed(0)
    return One(make()), torch.randn(shape)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_channels_of_a_convolution_have_the_trained_lengths(kind):
    model, x = convolved(kind)
    before, base = model(x), base_hash(model)
    bias = "none" if model.layer.bias is None else "lora"
    how = {"targets": ("layer",), "rank": 3, "alpha": 5, "use_dora": True, "bias": bias}
    lk.attach(model, lk.LoRAConfig(**how))
    assert torch.equal(model(x), before)
    randomise(model)
    adapter = lk.extract(model)
    tensors = {
        name: t.double().flatten(1) if t.dim() > 1 else t.double()
        for name, t in adapter.tensors.items()
    }
    plain = One(copy.deepcopy(CONVOLUTIONS[kind][0]()))
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if "adapter" not in n})
    plain.double()
    weight = plain.layer.weight.detach()
    changed = weight_of(weight.flatten(1), adapter, adapter.sites[0], tensors)
    plain.layer.weight = nn.Parameter(changed.reshape(weight.shape))
    if bias == "lora":
        plain.layer.bias.data = tensors["layer.bias"]
    exact = plain(x.double()).float()
    torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(model(x), exact, rtol=1e-5, atol=1e-5)
    lk.detach(model)
    assert base_hash(model) == base


@pytest.mark.parametrize("kind", ["2d", "grouped"])
def test_gradients_of_a_convolution_take_the_norm_as_a_constant(kind):
    model, x = convolved(kind)
    model, x = model.double(), x.double()
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=3, alpha=5, use_dora=True))
    randomise(model)
    model.layer.adapter_bank.double()
    adapter = lk.extract(model)
    tensors = {name: t.clone().requires_grad_() for name, t in adapter.tensors.items()}
    weight = model.layer.weight.detach()
    flat = {name: t.flatten(1) if t.dim() > 1 else t for name, t in tensors.items()}
    changed = weight_of(weight.flatten(1), adapter, adapter.sites[0], flat)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    own = model.layer
    bias = None if own.bias is None else own.bias.detach()
    made = nn.functional.conv2d(
        other, changed.reshape(weight.shape), bias, dilation=own.dilation, groups=own.groups
    )
    made.square().sum().backward()
    model.train()(leaf).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    for name, parameter in adapter_parameters(model, "default"):
        torch.testing.assert_close(parameter.grad, tensors[name].grad)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_rows_of_a_batch_have_convolutions_of_their_own_lengths(kind):
    model, x = convolved(kind)
    x = torch.cat([x, x])
    attach_random(model, "one", use_dora=True, targets=("layer",))
    attach_random(model, "two", seed=1, targets=("layer",))
    names = ["one", None, "two", {"one": 0.5, "two": 2.0}]
    expected = []
    for row, name in enumerate(names):
        with lk.route(model, name), torch.no_grad():
            expected.append(model(x[row : row + 1])[0])
    with lk.route(model, names), torch.no_grad():
        torch.testing.assert_close(model(x), torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_rows_of_a_batch_have_embeddings_of_their_own_lengths():
    model = build("llama")
    attach_random(model, "one", use_dora=True, targets=("embed", "q"))
    attach_random(model, "two", seed=1, targets=("embed",))
    inputs, names = example_inputs(model, rows=3), ["one", None, {"one": 0.5, "two": 1.0}]
    expected = torch.stack(alone(model, inputs, names))
    with lk.route(model, names):
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_files_hold_the_lengths(family, tmp_path):
    model = build(family)
    plan = lk.plan(model, lk.LoRAConfig(use_dora=True, **TINY[family]))
    attach_random(model, use_dora=True, **TINY[family])
    adapter, expected = lk.extract(model), outputs(model, example_inputs(model))
    norms = [t for n, t in adapter.tensors.items() if n.endswith("magnitude")]
    assert len(norms) == len(adapter.sites)
    assert plan.parameters == adapter.parameters == sum(t.numel() for t in adapter.tensors.values())
    loaded = lk.Adapter.load(adapter.save(tmp_path / "a"))
    assert loaded.content_hash() == adapter.content_hash()
    lk.detach(model)
    lk.attach(model, loaded)
    assert torch.equal(outputs(model, example_inputs(model)), expected)


def test_slices_have_a_form_of_their_own_which_says_why(tmp_path):
    model = build("gpt2")
    attach_random(model, targets=("q",), use_dora=True)
    folder = lk.extract(model).save(tmp_path / "a")
    text = (folder / "adapter_config.json").read_text()
    assert "PEFT's DoRA has the magnitudes of all rows of a layer, and this is a slice" in text


def test_a_missing_length_is_named():
    model = build("llama")
    attach_random(model, use_dora=True)
    adapter = lk.extract(model)
    tensors = dict(adapter.tensors)
    gone = next(name for name in tensors if name.endswith("magnitude"))
    del tensors[gone]
    lk.detach(model)
    broken = replace(adapter, tensors=tensors)
    with pytest.raises(AdapterFileError, match=f"{gone}  missing"):
        lk.attach(model, broken)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bank_serves_it_also_in_the_form_for_compiled_models(compiled, tmp_path):
    model = build("llama")
    inputs = example_inputs(model, rows=3)
    folders = {}
    for name, dora in (("dora", True), ("lora", False)):
        attach_random(model, name, targets=("q", "v"), use_dora=dora)
        folders[name] = lk.extract(model, name).save(tmp_path / name)
    expected = alone(model, inputs, ["dora", "lora", None])
    lk.detach(model)
    bank = lk.AdapterBank(model)
    for name, folder in folders.items():
        bank.load(name, folder)
    attachment_of(model).compiled = compiled
    with bank.route(["dora", "lora", None]):
        for row, own in zip(outputs(model, inputs), expected, strict=True):
            torch.testing.assert_close(row, own, rtol=1e-5, atol=1e-5)
