"""Adapted models trained by the fused kernel, beside plain torch (`--kernels plain`)."""

import copy
import itertools

import pytest
import torch

import lorakit as lk
from covering import covering
from lorakit.kernels import fused
from lorakit.kernels.choice import use
from lorakit.methods.lora.lora import positions
from references import attach_random, checkpoint_blocks
from tiny_models import build, example_inputs

ROUTES = {
    "one": "first",
    "weakened": {"first": 0.5},
    "rows": ["first", None, "second", "first", {"first": 0.5, "second": -2.0}],
    "rows that lie together": ["second", "second", None, "first", "first"],
}
# Biases on Linear and Conv1D; slices that are contiguous (gpt2) and interleaved (gpt_neox).
FAMILIES = ("llama", "gpt2", "gpt_neox", "bert")
CHECKPOINTING = [{"use_reentrant": False}, {"use_reentrant": True}]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make several pieces of a few tokens."""
    monkeypatch.setattr(fused, "_PIECE", 5)


def adapted(family, *, dropout=0.2):
    """A float64 model in training mode with two adapters that overlap."""
    model = build(family).double()
    targets, bias = ("q", "v", "embed"), "none" if family == "llama" else "lora"
    config = {"dropout": dropout, "dtype": "float32"}
    attach_random(model, "first", rank=3, targets=targets, bias=bias, **config)
    attach_random(model, "second", seed=1, rank=5, alpha=20, targets=("all-linear",), **config)
    return model.double().train()


def gradients(model, route, *, seed=0):
    """The output and all gradients of one forward and backward pass."""
    inputs = example_inputs(model, rows=5)
    model.zero_grad()
    torch.manual_seed(seed)
    with lk.route(model, route):
        logits = model(**inputs).logits
        logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach(), "random state": torch.get_rng_state()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@covering(("family", "named"), itertools.product(FAMILIES, ROUTES))
def test_gradients_equal_plain_torch_with_all_options_together(family, named, monkeypatch):
    model, route = adapted(family), ROUTES[named]
    with use("plain"):
        expected = gradients(model, route)
    calls = []
    kernel = fused.add_updates
    monkeypatch.setattr(fused, "add_updates", lambda *given: calls.append(1) or kernel(*given))
    assert_equal(gradients(model, route), expected)
    assert calls
    assert not torch.equal(gradients(model, route, seed=1)["logits"], expected["logits"])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("route", ["first", ROUTES["rows"]], ids=["one", "rows"])
@pytest.mark.parametrize("settings", CHECKPOINTING, ids=str)
def test_checkpointing_recomputes_the_same_masks(settings, route):
    model = adapted("llama")
    expected = gradients(model, route)
    checkpoint_blocks(model, settings)
    model.disable_input_require_grads()
    assert_equal(gradients(model, route), expected)


def test_a_deep_copy_made_after_a_forward_pass_trains_alike():
    model = adapted("gpt2")
    expected = gradients(model, "first")
    assert_equal(gradients(copy.deepcopy(model), "first"), expected)


@pytest.mark.parametrize("route", ["first", ["first", None, "second"]], ids=["one", "rows"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_half_precision_layer_keeps_its_input_and_products_of_rank_columns(route, dropout):
    model = build("llama").bfloat16()
    for name, rank in (("first", 3), ("second", 5)):
        attach_random(model, name, rank=rank, targets=("q",), dropout=dropout)
    layer, x = model.train().model.layers[0].self_attn.q_proj, torch.randn(3, 7, 32).bfloat16()
    mine = {p.data_ptr() for p in model.parameters()} | {x.data_ptr()}
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with lk.route(model, route), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert x.data_ptr() in kept
    shapes = {tuple(t.shape) for address, t in kept.items() if address not in mine}
    assert shapes == ({(3, 21)} if route == "first" else {(3, 7), (5, 7)})


def test_the_numbers_of_interleaved_rows_serve_training_after_inference():
    positions.cache_clear()
    model = build("gpt_neox")
    attach_random(model, targets=("q",))
    inputs = example_inputs(model)
    with torch.inference_mode():
        model(**inputs)
    for kernels in ("auto", "plain"):
        model.zero_grad()
        with use(kernels):
            model(**inputs).logits.square().sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert trained
        assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.thorough
def test_a_compiled_model_trains_as_an_eager_one(forks):
    # In a process of its own, because the shape checks of the tests are not for compiling.
    program = """
import torch, lorakit as lk
from lorakit.attachment.attach import adapter_parameters
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
lk.attach(model, lk.LoRAConfig(targets=("0", "2"), rank=2, bias="lora"))
weights = [p for _, p in adapter_parameters(model, "default")]
for weight in weights:
    torch.nn.init.normal_(weight)
x = torch.randn(3, 8)
def gradients(model):
    return torch.autograd.grad(model.train()(x).square().sum(), weights)
expected = gradients(model)
for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    torch.testing.assert_close(gradients(torch.compile(model, backend=backend)), expected)
lk.detach(model)
lk.attach(model, lk.LoRAConfig(targets=("0", "2"), rank=2, dropout=0.5))
torch._dynamo.reset()
compiled = torch.compile(model.train(), backend="aot_eager")
compiled(x).square().sum().backward()
"""
    forks.run(program)
