"""Compiled models: another route, or another resident adapter, compiles nothing again."""

from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.attachment.state import is_compiled, require_attachment
from lorakit.routing.compiled_batch import StaticLoRA
from references import alone, attach_random, outputs
from tiny_models import build, example_inputs

PROGRAM = """
import torch
import torch._dynamo as dynamo
import lorakit as lk
from references import attach_random
from tiny_models import build, example_inputs

def made(seed, **settings):
    model = build({family!r}, **{size})
    torch.manual_seed(seed)
    attach_random(model, modules_to_save=(), **settings)
    return lk.extract(model)

adapters = {{
    "small": made(0, rank=2, alpha=3, targets=("q", "v")),
    "wide": made(1, rank=5, alpha=20, targets=("attention",)),
    "late": made(2, rank=9, targets=("all-linear",)),
}}
plain, inner = build({family!r}, **{size}).eval(), build({family!r}, **{size}).eval()
model = torch.compile(inner, backend="eager")
inputs = {{name: torch.cat([x, x]) for name, x in example_inputs(plain).items()}}
expected, bank = lk.AdapterBank(plain), lk.AdapterBank(model)
for each in (expected, bank):
    each.add("small", adapters["small"])
    each.add("wide", adapters["wide"])

@torch.no_grad()
def check(route):
    with expected.route(route):
        wanted = plain(**inputs).logits
    with bank.route(route):
        torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-5)
    return wanted

half = len(next(iter(inputs.values()))) // 2
check(["small"] * half + ["wide"] * half)
base, other = check(None), check("small")
assert (base - other).abs().max() > 1e-3
dynamo.config.error_on_recompile = True
check(["wide", *["small"] * (2 * half - 2), None])
check("wide")
for each in (expected, bank):
    each.add("late", adapters["late"])
    each.unload("small")
check(["late"] * half + [{{"wide": 0.5, "late": 2.0}}] * half)
check({{"late": 0.5}})
check("late")
check(None)
"""


ROWS = """
import pytest
import torch
import lorakit as lk
from lorakit.errors import RouteError
from references import attach_random
from tiny_models import build

def made(in_place):
    model = build("llama").eval()
    if in_place:
        model.compile(backend="eager")
    compiled = model if in_place else torch.compile(model, backend="eager")
    bank = lk.AdapterBank(compiled)
    torch.manual_seed(3)
    attach_random(model, targets=("q",))
    return bank, compiled

ids = torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7], [8, 9, 10]])
for in_place in (True, False):
    bank, model = made(in_place)
    with bank.route(["default", None]):
        with pytest.raises(RouteError, match="the route is for 2 rows, but the batch has 4"):
            model(input_ids=ids)
        with pytest.raises(RouteError, match="has 3 rows"):
            model(ids[:3])
        assert model(input_ids=ids[:2]).logits.shape[0] == 2
    assert model(input_ids=ids).logits.shape[0] == 4
    lk.detach(bank.model)
    assert model(input_ids=ids[:3]).logits.shape[0] == 3

plain = build("llama").eval()
torch.manual_seed(3)
attach_random(plain, targets=("q",))
texts = []
for bank in (made(in_place=True)[0], lk.AdapterBank(plain)):
    with bank.route(["default", None]):
        texts.append(bank.model.generate(ids[:2], max_new_tokens=3, num_beams=2, pad_token_id=0))
assert torch.equal(*texts)
"""


# Programs run apart, since the compiler can't trace through the checks of shapes.


@pytest.mark.parametrize(
    ("family", "size"),
    [
        pytest.param("gpt2", {"n_layer": 1}, id="gpt2"),
        pytest.param("llama", {}, id="llama", marks=pytest.mark.thorough),
        pytest.param("gpt_neox", {}, id="gpt_neox", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.thorough
def test_a_new_route_and_a_new_resident_compile_nothing(family, size, forks):
    forks.run(PROGRAM.format(family=family, size=size))


@pytest.mark.thorough
def test_rows_are_counted_in_front_of_the_compiled_code_and_beams_are_known(forks):
    forks.run(ROWS)


def test_a_bank_knows_a_compiled_model():
    model = build("llama")
    assert not is_compiled(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert is_compiled(compiled)
    model.compile(backend="eager")
    assert is_compiled(model)


def test_trained_adapters_of_a_compiled_model_keep_their_gradients():
    model = build("llama")
    compiled: Any = torch.compile(model, backend="eager")
    bank = lk.AdapterBank(compiled)
    attach_random(model, targets=("q",))
    with bank.route(["default", None]):
        operations = require_attachment(model).route.top.operations
        assert not any(isinstance(operation, StaticLoRA) for operation in operations.values())
        inputs = torch.ones(2, 3, dtype=torch.long)
        model(input_ids=inputs).logits.sum().backward()
    trained = [p for name, p in model.named_parameters() if "lora_b" in name]
    assert all(p.grad is not None and p.grad.any() for p in trained)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_the_unchanging_form_holds_slices_ranks_and_trained_biases(family):
    model = build(family)
    attach_random(model, "one", rank=2, targets=("q", "v"), bias="all", modules_to_save=())
    attach_random(model, "two", seed=1, rank=5, bias="lora", modules_to_save=())
    attach_random(model, "three", seed=2, targets=("k",), modules_to_save=())
    model.requires_grad_(False)
    inputs = example_inputs(model, rows=5)
    names = ["two", None, {"one": 0.5, "two": -1.5}, "three", "one"]
    expected = alone(model, inputs, names)
    model._lorakit.compiled = True
    with lk.route(model, names):
        operations = model._lorakit.route.top.operations
        assert any(isinstance(operation, StaticLoRA) for operation in operations.values())
        found = outputs(model, inputs)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
