"""LoRA on each kind of layer, against ΔW formed naively in float64."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorakit as lk
from covering import covering
from lorakit.kernels.choice import use
from references import base_hash, randomise

CONVS = [
    (kind, groups, kernel, stride, padding, dilation, mode)
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for groups, kernel, stride, padding, dilation in [
        (1, 1, 1, 0, 1),
        (1, 3, 1, 1, 1),
        (1, 3, 2, 0, 1),
        (2, 3, 1, 2, 2),
        (4, 3, 2, 1, 1),
        (1, 3, 1, "same", 2),
    ]
    for mode in ("zeros", "circular", "reflect", "replicate")
    if not (kind is nn.Conv3d and groups == 4)
]


class One(nn.Module):
    """A model of one layer."""

    layer: Any

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def with_delta(model: One) -> nn.Module:
    """A plain float64 layer whose weight is W + scale·B·A, summed entry by entry."""
    adapter = lk.extract(model)
    plain = copy.deepcopy(model)
    lk.detach(plain)
    layer = plain.layer.double()
    transposed = isinstance(layer, Conv1D | nn.Embedding)
    for site in adapter.sites:
        a = adapter.tensors[f"{site.name}.lora_a"].double()
        b = adapter.tensors[f"{site.name}.lora_b"].double()
        delta = site.scale * torch.einsum("o r, r i -> o i", b.flatten(1), a.flatten(1))
        weight = layer.weight.data.T if transposed else layer.weight.data
        pairs = site.rows if site.rows is not None else ((0, weight.shape[0]),)
        rows = itertools.chain(*(range(*pair) for pair in pairs))
        for row, values in zip(rows, delta, strict=True):
            weight[row] += values.reshape(weight[row].shape)
    for name, tensor in adapter.tensors.items():
        if name == "layer.bias":
            layer.bias.data = tensor.double()
    return layer


def check(layer: nn.Module, x: torch.Tensor, **config) -> None:
    """Compare an adapted layer, unmerged and merged, with the naive one."""
    torch.manual_seed(0)
    model = One(layer)
    before = base_hash(model)
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=3, alpha=5, **config))
    randomise(model)
    exact = with_delta(model)(x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-4, atol=1e-4)
    lk.merge(model)
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-4, atol=1e-4)
    lk.detach(model)
    assert base_hash(model) == before


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init": "gaussian"}])
def test_linear_equals_the_sum_of_weights(bias, options):
    check(nn.Linear(7, 5, bias=bias), torch.randn(2, 4, 7), **options)


def test_a_trained_bias_replaces_the_base_bias():
    check(nn.Linear(7, 5), torch.randn(2, 4, 7), bias="lora")
    check(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 8, 8), bias="all")


def test_conv1d_of_transformers_equals_the_sum_of_weights():
    check(Conv1D(5, 7), torch.randn(2, 4, 7), bias="lora")


def test_embedding_equals_the_sum_of_weights():
    check(nn.Embedding(11, 6, padding_idx=0), torch.tensor([[0, 3, 10], [3, 3, 1]]))


@covering(("kind", "groups", "kernel", "stride", "padding", "dilation", "mode"), CONVS, each=4)
def test_convolutions_equal_the_sum_of_weights(
    kind, groups, kernel, stride, padding, dilation, mode
):
    layer = kind(
        4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        padding_mode=mode,
    )  # fmt: skip
    dimensions = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    check(layer, torch.randn(2, 4, *[7] * dimensions))


def test_dropout_scales_what_it_keeps_and_is_off_in_eval():
    torch.manual_seed(0)
    model = One(nn.Linear(400, 3, bias=False))
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=2, dropout=0.25))
    randomise(model)
    x = torch.randn(1, 400)
    exact = model.eval()(x)
    assert torch.equal(model(x), exact)
    model.train()
    draws = model(x.expand(4000, 400))
    assert not torch.allclose(draws[:1], exact)
    assert not torch.allclose(draws[0], draws[1])
    torch.testing.assert_close(draws.mean(0, keepdim=True), exact, rtol=0.05, atol=0.05)


def test_dropout_of_an_embedding_drops_whole_tokens():
    model = One(nn.Embedding(5, 4))
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=2, dropout=0.5))
    randomise(model)
    ids = torch.arange(5).repeat(40, 1)
    lk.switch(model, None)
    base = model(ids)
    lk.switch(model, "default")
    whole = model.eval()(ids) - base
    dropped = model.train()(ids) - base
    is_zero = dropped.abs().amax(-1) < 1e-6
    assert 60 < int(is_zero.sum()) < 140
    torch.testing.assert_close(dropped[~is_zero], 2 * whole[~is_zero])


def test_a_fresh_a_is_as_the_config_says():
    def drawn(init: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = One(nn.Linear(400, 8))
        lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=64, init=init))
        adapter = lk.extract(model)
        assert not adapter.tensors["layer.lora_b"].any()
        return adapter.tensors["layer.lora_a"]

    uniform, normal = drawn("kaiming"), drawn("gaussian")
    assert uniform.abs().max() <= 1 / 20
    assert uniform.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert normal.std().item() == pytest.approx(1 / 20, rel=0.05)
    assert normal.abs().max() > 1 / 20


def test_a_float32_adapter_on_a_bfloat16_base_keeps_its_precision():
    torch.manual_seed(0)
    model = One(nn.Linear(16, 16)).to(torch.bfloat16)
    lk.attach(model, lk.LoRAConfig(targets=("layer",)))
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    result = model(x)
    assert result.dtype == torch.bfloat16
    result.float().sum().backward()
    bank = model.layer.adapter_bank["@default"].parts["whole"]
    assert bank.lora_a.dtype == bank.lora_b.dtype == bank.lora_b.grad.dtype == torch.float32


def test_it_works_under_autocast_and_follows_the_model_to_another_precision():
    model = One(nn.Linear(16, 16))
    lk.attach(model, lk.LoRAConfig(targets=("layer",)))
    randomise(model)
    x = torch.randn(4, 16)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        torch.testing.assert_close(model(x).float(), exact, rtol=0.05, atol=0.05)
    torch.testing.assert_close(model.double()(x.double()).float(), exact)


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_a_forward_never_forms_b_times_a(kernels):
    model = One(nn.Linear(64, 64, bias=False))
    lk.attach(model, lk.LoRAConfig(targets=("layer",), rank=2))
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if "mm" in str(func):
                sizes.append(tuple(result.shape))
            return result

    with use(kernels), Watch():
        model(torch.randn(3, 64)).sum().backward()
    assert {(3, 2), (2, 3)} & set(sizes)
    # The only square product would be that of B and A, or the gradient of the frozen weight.
    assert (64, 64) not in sizes


@pytest.mark.thorough
def test_compile_makes_one_graph_of_adapted_layers(forks):
    # In a process of its own, because the shape checks of the tests are not for compiling.
    program = """
import torch, lorakit as lk
from torch._dynamo.testing import CompileCounter
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
lk.attach(model, lk.LoRAConfig(targets=("0", "2"), rank=2, bias="lora"))
counter, x = CompileCounter(), torch.randn(3, 8)
compiled = torch.compile(model, backend=counter, fullgraph=True)
torch.testing.assert_close(compiled(x), model(x))
assert counter.frame_count == 1, counter.frame_count
"""
    forks.run(program)
