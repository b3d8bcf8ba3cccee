"""Heads of their own in a mixed batch: one product for all of a shape, each row as if alone."""

import collections
import dataclasses
import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
from covering import covering
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import RouteError
from lorakit.kernels.grouped import gather
from lorakit.routing import stacked_heads as heads
from lorakit.routing.row_groups import ByRowGroup
from lorakit.routing.stacked_heads import StackedHeads
from references import alone, attach_random, outputs, randomise
from tiny_models import build, example_inputs

FAMILIES = ("bert", "roberta", "deberta-v2")
"""A linear classifier; a module of two layers; a pooler and a linear classifier."""
CLASSES = {"a": 3, "b": 3, "c": 3, "d": 3, "two": 2, "five": 5, "5": 5}
EQUAL = ["c", "a", None, "b", "a", "d", "a", None]
WIDTHS = ["five", "a", None, "two", "5", "b", "five", "two", "c"]
SUMS = [
    {"a": 0.7, "b": 0.6},
    {"c": 0.5},
    "a",
    None,
    {"b": 1.0, "c": -1.0, "d": 0.1},
    {"a": 0.2},
]
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@functools.cache
def adapter(family: str, classes: int, seed: int, **settings: Any) -> lk.Adapter:
    model = build(family, num_labels=classes)
    attach_random(model, rank=2, seed=seed, **settings)
    return dataclasses.replace(lk.extract(model), base=None)


def adapted(family: str, *, train: bool = False, **settings: str):
    """A model with adapters whose heads have three classes, as the base's, or others."""
    model = build(family)
    bank = lk.AdapterBank(model)
    for seed, (name, classes) in enumerate(CLASSES.items()):
        bank.add(name, adapter(family, classes, seed, **settings))
    return model.requires_grad_(train)


def stacks(model) -> list[StackedHeads]:
    """The heads of the route that is open, of which there is at least one."""
    found = [c for c in model._lorakit.route.top.operations.values() if isinstance(c, StackedHeads)]
    assert found
    assert not any(each._refused for each in found)
    return found


def check_rows(model, names, **close) -> None:
    inputs = example_inputs(model, rows=len(names))
    with lk.route(model, names):
        mixed = outputs(model, inputs)
        stacks(model)
    widest = max(CLASSES.get(n, 3) if isinstance(n, str) else 3 for n in names)
    assert mixed.shape == (len(names), widest)
    for found, expected in zip(mixed, alone(model, inputs, names), strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, **close)
        assert (found[len(expected) :] == float("-inf")).all()


ROWS = {"equal": EQUAL, "widths": WIDTHS, "weighted": SUMS, "all": [*SUMS, *WIDTHS]}


@covering(("family", "rows"), itertools.product(FAMILIES, ROWS))
def test_every_row_is_answered_by_its_own_head_as_if_alone(family, rows):
    model = adapted(family)
    check_rows(model, ROWS[rows], rtol=1e-5, atol=1e-5)
    check_rows(model.double(), ROWS[rows], **EXACT)


def test_heads_of_several_precisions_answer_in_one_batch():
    model = adapted("roberta").bfloat16()
    attach_random(model, "narrow", rank=2, dtype="bfloat16")
    attach_random(model, "a copy", rank=2, seed=1, dtype="bfloat16")
    names = ["a", "narrow", {"b": 0.3, "narrow": 0.9}, "a copy", None, "c"]
    check_rows(model.requires_grad_(False), names, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_a_head_keep_every_bit_of_the_base(family):
    model = adapted(family)
    inputs = example_inputs(model, rows=len(WIDTHS))
    with lk.route(model, WIDTHS):
        mixed = outputs(model, inputs)
    assert torch.equal(mixed[2, :3], outputs(build(family), inputs)[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_spoiled_head_changes_no_bit_of_other_rows(family, poison):
    model = adapted(family)
    inputs = example_inputs(model, rows=6)
    names = ["a", "b", None, {"c": 0.5, "d": 0.5}, "b", "c"]
    with lk.route(model, names):
        before = outputs(model, inputs)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model, "b"):
            if "lora" not in name:
                parameter.fill_(poison)
    with lk.route(model, names):
        after = outputs(model, inputs)
    assert torch.equal(after[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert not torch.isclose(after[[1, 4]], before[[1, 4]]).any()


@pytest.mark.parametrize("each", [1, 3])
def test_several_entries_to_a_row_are_answered_by_its_head(each):
    model = adapted("bert").double()
    # As a family says of its layers: without that, several entries to a row are an error.
    model.classifier.adapter_pieces = each > 1
    names = ["five", None, "a", {"a": 0.5, "b": 2.0}, "two"]
    x = torch.randn(len(names) * each, 4, 32, dtype=torch.float64)
    with torch.no_grad(), lk.route(model, names):
        found = model.classifier(x)
        assert stacks(model)
    for row, name in enumerate(names):
        mine = slice(row * each, (row + 1) * each)
        with torch.no_grad(), lk.route(model, name):
            expected = model.classifier(x[mine])
        torch.testing.assert_close(found[mine, ..., : expected.shape[-1]], expected, **EXACT)
    model.classifier.adapter_pieces = False
    with lk.route(model, names), pytest.raises(RouteError, match="for 5 rows"):
        model.classifier(x[1:] if each == 1 else x)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_heads_are_those_of_separate_runs(family):
    model = adapted(family, train=True).double()
    names = ["five", "a", None, {"a": 0.5, "b": 2.0}, "b", "two", "five"]
    inputs = example_inputs(model, rows=len(names))

    def gradients(rows, choice):
        with lk.route(model, choice):
            logits = model(**{k: v[rows] for k, v in inputs.items()}).logits
            assert len(logits) == 1 or stacks(model)
        logits[logits.isfinite()].square().sum().backward()

    gradients(slice(None), names)
    mixed = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(names):
        gradients(slice(row, row + 1), name)
    separate = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == separate.keys()
    assert any("@five.copy" in name for name in mixed)
    for key, gradient in mixed.items():
        torch.testing.assert_close(gradient, separate[key], **EXACT, msg=key.__add__)


class Counter(TorchDispatchMode):
    """Counts torch's calls by name."""

    def __init__(self):
        super().__init__()
        self.calls: collections.Counter[Any] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_more_adapters_are_no_more_products(family, train):
    model = adapted(family, train=train)
    inputs = example_inputs(model, rows=8)

    def products(names):
        with lk.route(model, names), Counter() as counter:
            model(**inputs)
        return sum(n for name, n in counter.calls.items() if "mm" in name)

    assert products(["a", "b", "c", "d"] * 2) == products(["a", "b"] * 4)
    # A sum of two counts twice, and another width once more, however many there are.
    assert products([{"a": 0.5}, {"b": 0.5}, "c", "d", "two", "five", "5", None]) <= products(
        [{"a": 0.5}, "c", "two", "five"] * 2
    )


def test_frozen_heads_are_stacked_once_for_a_route_and_trained_ones_in_each_pass(monkeypatch):
    calls: list[Any] = []
    monkeypatch.setattr(heads, "gather", lambda *args: calls.append(args) or gather(*args))
    for train, expected in ((False, 0), (True, 2)):
        model = adapted("bert", train=train)
        with lk.route(model, ["a", "b"]):
            calls.clear()
            outputs(model, example_inputs(model))
            assert len(calls) == expected


def test_a_trained_head_that_stepped_is_not_served_old():
    model = adapted("roberta", train=True)
    names = ["a", "b", "five"]
    inputs = example_inputs(model, rows=3)
    with lk.route(model, names):
        before = outputs(model, inputs)
        randomise(model, "a", seed=99)
        after = outputs(model, inputs)
    assert torch.equal(after[1:], before[1:])
    torch.testing.assert_close(after[0, :3], alone(model, inputs, names)[0])
    assert not torch.isclose(after[0, :3], before[0, :3]).any()


def test_dropout_in_a_head_is_each_rows_own():
    model = adapted("roberta")
    for (_, a), (_, b) in zip(*(adapter_parameters(model, name) for name in "ab"), strict=True):
        b.copy_(a)
    x = torch.randn(1, 4, 32).expand(4, -1, -1)
    with torch.no_grad(), lk.route(model, ["a", "b", None, "a"]):
        exact = model.classifier(x)
        model.classifier.train()
        drawn = torch.stack([model.classifier(x) for _ in range(400)])
        assert stacks(model)
    for first, second in ((0, 1), (0, 3), (1, 3)):
        assert not torch.isclose(drawn[0, first], drawn[0, second]).all()
    torch.testing.assert_close(drawn.mean(0), exact, rtol=0.2, atol=0.05)


def test_heads_answer_in_inference_mode_and_beside_a_forward_pass_with_gradients():
    model = adapted("deberta-v2")
    names = ["a", "five", "b"]
    inputs = example_inputs(model, rows=3)
    with lk.route(model, names):
        expected = model(**inputs).logits
        with torch.inference_mode():
            assert torch.equal(model(**inputs).logits, expected)
        assert stacks(model)


COMPILED = """
import torch
from routing.test_stacked_heads import WIDTHS, adapted, stacks
import lorakit as lk
model = adapted("roberta", train=True).double()
compiled = torch.compile(model.classifier, backend="eager", fullgraph=True)
parameters = [p for p in model.classifier.parameters() if p.requires_grad]
x = torch.randn(len(WIDTHS), 4, 32, dtype=torch.float64)
with lk.route(model, WIDTHS):
    found = []
    for head in (model.classifier, compiled):
        logits = head(x)
        loss = logits[logits.isfinite()].square().sum()
        found.append([logits, *torch.autograd.grad(loss, parameters, materialize_grads=True)])
    assert stacks(model)
torch.testing.assert_close(*found)
"""


@pytest.mark.thorough
def test_compiled_heads_answer_and_train_alike(forks):
    # Apart, because the compiler can't trace through the shape checks that tests run with.
    here = str(Path(__file__).parent)
    forks.run(COMPILED, PYTHONPATH=os.pathsep.join([here, *sys.path]))


class Choosy(nn.Module):
    """A head that looks at its values, which vmap can't take."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 4)

    def forward(self, x):
        return self.dense(x) if x.sum() > -1e9 else x


class Normed(nn.Module):
    """A head with buffers, which it writes in training."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.dense = nn.Linear(6, 4)

    def forward(self, x):
        return self.dense(self.norm(x))


class Watched(nn.Module):
    """A head that looks at the adapters' parameters while it computes."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 4)
        self.watch = []

    def forward(self, x):
        for look in self.watch:
            look()
        return self.dense(x)


def with_head(head: nn.Module) -> Any:
    model = nn.Sequential(collections.OrderedDict(body=nn.Linear(6, 6), head=head)).eval()
    for seed, name in enumerate("abc"):
        attach_random(model, name, seed=seed, targets=("body",), rank=2, modules_to_save=("head",))
    return model.requires_grad_(False)


@torch.no_grad()
def check_layer(model, x, names) -> dict[str, Any]:
    with lk.route(model, names):
        mixed = model(x)
        operations = dict(model._lorakit.route.top.operations)
    for row, name in enumerate(names):
        with lk.route(model, name):
            torch.testing.assert_close(mixed[row : row + 1], model(x[row : row + 1]))
    return operations


def test_a_head_that_vmap_refuses_is_done_blend_by_blend():
    operations = check_layer(with_head(Choosy()), torch.randn(4, 6), ["a", None, "b", "a"])
    assert [c._refused for c in operations.values() if isinstance(c, StackedHeads)] == [True]


@pytest.mark.parametrize("head", [Normed, functools.partial(nn.Conv1d, 6, 6, 1)])
def test_other_modules_answer_as_if_alone(head):
    x = torch.randn(4, 6) if head is Normed else torch.randn(4, 6, 6)
    operations = check_layer(with_head(head()), x, ["a", None, "b", {"a": 0.5, "c": 0.4}])
    assert any(isinstance(c, StackedHeads) for c in operations.values()) is (head is not Normed)


def test_large_copies_are_not_held_twice(monkeypatch):
    monkeypatch.setattr(heads, "LARGEST", 10)
    operations = check_layer(with_head(nn.Linear(6, 4)), torch.randn(2, 6), ["a", "b"])
    assert not any(isinstance(c, StackedHeads) for c in operations.values())
    assert any(isinstance(c, ByRowGroup) for c in operations.values())


def test_an_error_of_a_head_is_told_as_it_is():
    model = with_head(nn.Linear(6, 4))
    with lk.route(model, ["a", "b"]), pytest.raises(RuntimeError, match=r"6x4|must match|shapes"):
        model.head(torch.randn(2, 5))


def test_copies_of_token_embeddings_are_done_blend_by_blend():
    model = build("bert")
    for seed, name in enumerate("ab"):
        attach_random(model, name, seed=seed, modules_to_save=("word_embeddings",))
    inputs, names = example_inputs(model, rows=3), ["b", None, "a"]
    with lk.route(model, names):
        mixed = outputs(model, inputs)
    torch.testing.assert_close(mixed, torch.stack(alone(model, inputs, names)))


def test_other_threads_never_see_stacked_parameters_in_the_copies():
    head: Any = Watched()
    model = with_head(head)
    seen = []

    def look():
        shapes = [p.shape for name in "abc" for _, p in adapter_parameters(model, name)]
        seen.append([tuple(s) for s in shapes])

    expected = [tuple(p.shape) for name in "abc" for _, p in adapter_parameters(model, name)]
    for layer in (head, *(update.copy for update in head.adapter_bank.values())):
        layer.watch.append(look)
    with torch.no_grad(), lk.route(model, ["a", "b", None]):
        model(torch.randn(3, 6))
        assert stacks(model)
    assert seen == [expected] * len(seen)
    assert len(seen) == 2
