"""Linear layers of few rows, computed in other ways than torch's."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorakit.kernels import few_rows as kernel
from lorakit.kernels.choice import use
from lorakit.kernels.few_rows import WAYS, FewRows, few_rows

SHAPES = ((1, 5, 3), (3, 7, 16), (16, 64, 33))
"""Rows, d_out, d_in."""


@pytest.fixture
def times(monkeypatch):
    """The seconds that each way is said to take; other shapes and models are not known."""
    monkeypatch.setattr(kernel, "_known", {})
    monkeypatch.setattr(kernel, "_of_models", {})
    monkeypatch.setattr(kernel, "LEAST_VALUES", 1)
    told = {"own": 1.0, "turned": 0.5, "onednn": 0.6}
    monkeypatch.setattr(kernel, "_timed", lambda *_: dict(told))
    return told


def called(monkeypatch, name):
    """The inputs' shapes with which a way is called from now on."""
    shapes, own = [], WAYS[name]

    def note(x, weight, bias):
        shapes.append(tuple(x.shape))
        return own(x, weight, bias)

    monkeypatch.setattr(kernel, "WAYS", {**WAYS, name: note})
    return shapes


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "out", "features"), SHAPES)
@torch.no_grad()
def test_ways_agree(name, has_bias, rows, out, features):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, features), torch.randn(out, features)
    bias = torch.randn(out) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(WAYS[name](x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_inputs_keep_their_dimensions(name):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9), torch.randn(2, 2, 6)
    with FewRows(4, {(9, 6): name}):
        found = layer(x)
    torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-6)
    assert found.shape == (2, 2, 9)


def test_the_fastest_way_is_taken(times, monkeypatch):
    shapes = called(monkeypatch, "turned")
    layer = nn.Linear(6, 9)
    with torch.no_grad(), few_rows(layer, 4):
        layer(torch.zeros(4, 1, 6))
    assert shapes == [(4, 6)]


def test_a_way_that_saves_little_is_not_taken(times):
    times.update(turned=0.95, onednn=0.92)
    assert not isinstance(few_rows(nn.Linear(6, 9), 4), FewRows)


def test_ways_that_save_little_of_a_model_are_not_taken(times, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6))
    slow = {"own": 100.0, "turned": 100.0, "onednn": 100.0}
    monkeypatch.setattr(kernel, "_timed", lambda _, shape, __: times if shape == (9, 6) else slow)
    assert not isinstance(few_rows(model, 4), FewRows)


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        (torch.zeros(3, 6), "of other rows"),
        (torch.zeros(4, 6, dtype=torch.float64), "of another precision"),
    ],
)
def test_other_inputs_are_torchs(times, monkeypatch, x, kind):
    shapes = called(monkeypatch, "turned")
    layer = nn.Linear(6, 9)
    with torch.no_grad(), few_rows(layer, 4):
        layer.to(x.dtype)(x)
    assert not shapes, kind


def test_gradients_are_torchs(times, monkeypatch):
    shapes = called(monkeypatch, "turned")
    layer = nn.Linear(6, 9)
    with few_rows(layer, 4):
        layer(torch.zeros(4, 6)).sum().backward()
    assert not shapes
    assert layer.weight.grad is not None


def test_other_threads_are_not_touched(times, monkeypatch):
    shapes = called(monkeypatch, "turned")
    layer = nn.Linear(6, 9)

    @torch.no_grad()
    def call():
        layer(torch.zeros(4, 6))

    thread = threading.Thread(target=call)
    with few_rows(layer, 4):
        thread.start()
        thread.join()
    assert not shapes


@pytest.mark.parametrize("rows", [0, 128])
def test_many_rows_are_torchs(times, rows):
    assert not isinstance(few_rows(nn.Linear(6, 9), rows), FewRows)


def test_plain_kernels_are_torchs(times):
    with use("plain"):
        assert not isinstance(few_rows(nn.Linear(6, 9), 4), FewRows)


def test_shapes_are_timed_once(monkeypatch):
    monkeypatch.setattr(kernel, "_known", {})
    monkeypatch.setattr(kernel, "_of_models", {})
    monkeypatch.setattr(kernel, "LEAST_VALUES", 1)
    first, second = nn.Linear(6, 9), nn.Linear(6, 9)
    few_rows(first, 4)
    ((key, times),) = kernel._known.items()
    assert key[:3] == (4, 9, 6)
    assert times.keys() == WAYS.keys()
    assert all(each > 0 for each in times.values())
    monkeypatch.setattr(kernel, "_timed", None)
    few_rows(second, 5)


def test_small_and_half_precision_weights_are_not_timed(monkeypatch):
    monkeypatch.setattr(kernel, "_timed", None)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(512, 512, dtype=torch.bfloat16))
    assert not isinstance(few_rows(model, 4), FewRows)
