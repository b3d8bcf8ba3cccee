"""What the Triton kernel of the loss promises, on a GPU, or in Triton's interpreter.

`test_interpreter.py` runs this file in a process of its own, and `test_cross_entropy_triton.py`
does on a GPU.
"""

import itertools
import os

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from covering import covering
from lorakit.kernels import cross_entropy_triton
from lorakit.kernels.cross_entropy import head_cross_entropy
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNEL = cross_entropy_triton._cross_entropy
TOKENS, D = 5, 8
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.02},
    "all": {"label_smoothing": 0.1, "z_loss": 0.02},
    "each its own": {
        "label_smoothing": torch.linspace(0, 0.5, TOKENS),
        "z_loss": torch.linspace(0.1, 0, TOKENS),
    },
}

CHANGES = {
    "multiplied": LogitTransform(scale=0.25),
    "capped": LogitTransform(cap=1.5),
    "both": LogitTransform(scale=-0.5, cap=30.0),
}


VOCABULARIES = (3, 32, 70)


@pytest.fixture(params=VOCABULARIES, ids="vocabulary={}".format)
def vocabulary(request, monkeypatch):
    """Return sizes that are less than a block of the kernel, one, and several and a part."""
    monkeypatch.setattr(KERNEL, "configs", [triton.Config({"BLOCK": 32}, num_warps=4)])
    return request.param


def answer(hidden, head, kernels, **options):
    """Return total, losses, and the gradient of the hidden states."""
    torch.manual_seed(1)
    targets = torch.randint(head.out_features, (TOKENS,))
    targets[1] = -100
    weights = torch.rand(TOKENS, device=DEVICE)
    leaf = hidden.detach().requires_grad_()
    total, losses = head_cross_entropy(
        leaf, head, targets.to(DEVICE), weights, chunk_tokens=2, kernels=kernels, **options
    )
    total.backward()
    return total.detach(), losses, leaf.grad


def made(vocabulary, *, dtype=torch.float32):
    torch.manual_seed(0)
    head = nn.Linear(D, vocabulary).requires_grad_(False)
    return torch.randn(TOKENS, D).mul(3).to(DEVICE, dtype), head.to(DEVICE, dtype)


@covering(
    ("vocabulary", "options"),
    itertools.product(VOCABULARIES, OPTIONS),
    each=1,
    indirect=["vocabulary"],
)
def test_loss_and_gradient_equal_plain_torch(vocabulary, options):
    for dtype in (torch.float32, torch.float16):
        hidden, head = made(vocabulary, dtype=dtype)
        found, plain = (
            answer(hidden, head, kernels, **OPTIONS[options]) for kernels in ("triton", "plain")
        )
        for ours, theirs in zip(found[:2], plain[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        bound = 4 * torch.finfo(dtype).eps * plain[2].abs().max().item()
        torch.testing.assert_close(found[2], plain[2], rtol=0, atol=bound)


@covering(
    ("vocabulary", "change"),
    itertools.product(VOCABULARIES, CHANGES),
    each=1,
    indirect=["vocabulary"],
)
def test_changed_logits_have_the_loss_and_gradient_of_plain_torch(vocabulary, change):
    for dtype in (torch.float32, torch.float16):
        hidden, head = made(vocabulary, dtype=dtype)
        options = {**OPTIONS["all"], "change": CHANGES[change]}
        found, plain = (answer(hidden, head, kernels, **options) for kernels in ("triton", "plain"))
        for ours, theirs in zip(found[:2], plain[:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        bound = 4 * torch.finfo(dtype).eps * plain[2].abs().max().item()
        torch.testing.assert_close(found[2], plain[2], rtol=0, atol=bound)


@triton.jit
def change_all(x, y, SCALE: tl.constexpr, CAP: tl.constexpr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(y + place, cross_entropy_triton._changed(tl.load(x + place), SCALE, CAP))


def test_capped_logits_have_all_their_digits_small_and_large():
    sizes = torch.cat([torch.logspace(-20, 4, 63), torch.tensor([1e30])])
    x = torch.cat([sizes, -sizes]).to(DEVICE)
    y = torch.empty_like(x)
    change_all[(1,)](x, y, 0.5, 30.0, len(x))
    exact = 30 * torch.tanh(x.double() / 60)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=0)


def test_a_head_with_trained_parameters_has_the_gradients_of_plain_torch(vocabulary):
    hidden, head = made(vocabulary)
    head.requires_grad_(True)
    gradients = []
    for kernels in ("triton", "plain"):
        answer(hidden, head, kernels, **OPTIONS["all"])
        gradients.append([parameter.grad.clone() for parameter in head.parameters()])
        head.zero_grad()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_logits_of_minus_infinity_have_no_share(vocabulary):
    logits = torch.randn(2, vocabulary, device=DEVICE)
    logits[0, :-1] = -torch.inf
    targets = torch.tensor([vocabulary - 1, 0], device=DEVICE)
    results = []
    for kernels in ("triton", "plain"):
        leaf = logits.clone().requires_grad_()
        weights = torch.ones(2, device=DEVICE)
        total, _ = head_cross_entropy(leaf, nn.Identity(), targets, weights, kernels=kernels)
        total.backward()
        results.append((total.detach(), leaf.grad))
    assert torch.isfinite(results[0][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_only_a_token_with_a_target_sees_what_is_not_a_number(vocabulary):
    logits = torch.randn(3, vocabulary, device=DEVICE)
    logits[:2, 1] = torch.nan
    targets = torch.tensor([0, -100, 2], device=DEVICE)
    leaf = logits.requires_grad_()
    weights = torch.ones(3, device=DEVICE)
    _, losses = head_cross_entropy(leaf, nn.Identity(), targets, weights, kernels="triton")
    assert losses.isnan().tolist() == [True, False, False]
    total, _ = head_cross_entropy(
        leaf[1:], nn.Identity(), targets[1:], weights[1:], kernels="triton"
    )
    total.backward()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[1].any()


def test_without_a_gradient_logits_stay_as_they_are(vocabulary):
    logits = torch.randn(2, vocabulary, device=DEVICE)
    before = logits.clone()
    targets, weights = torch.tensor([0, 1], device=DEVICE), torch.ones(2, device=DEVICE)
    head_cross_entropy(logits, nn.Identity(), targets, weights, kernels="triton")
    assert torch.equal(logits, before)


@pytest.fixture
def tuned(monkeypatch):
    """Let small calls be measured; return the configurations and the number of runs of each."""
    made = [triton.Config({"BLOCK": block}, num_warps=4) for block in (16, 32, 128)]
    runs = []

    def measure(call, quantiles):
        runs.append([call() for _ in range(3)])
        return [float(len(runs))] * len(quantiles)

    monkeypatch.setattr(KERNEL, "configs", made)
    monkeypatch.setattr(KERNEL, "cache", {})
    monkeypatch.setattr(KERNEL, "cache_results", False)
    monkeypatch.setitem(vars(KERNEL), "do_bench", measure)
    monkeypatch.setattr(cross_entropy_triton, "is_many", lambda _: True)
    return made, runs


@pytest.mark.parametrize(
    "change",
    [
        IDENTITY,
        CHANGES["both"],
        *(pytest.param(CHANGES[n], marks=pytest.mark.thorough) for n in ("multiplied", "capped")),
    ],
)
def test_trying_configurations_leaves_the_gradient_over_the_logits_right(tuned, change):
    hidden, head = made(40)
    options = {**OPTIONS["all"], "change": change}
    found, plain = (answer(hidden, head, kernels, **options) for kernels in ("triton", "plain"))
    assert [len(each) for each in tuned[1]] == [3, 3, 3]
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_configurations_are_tried_anew_for_another_vocabulary_and_without_a_gradient(tuned):
    for vocabulary in (100, 100, 50):
        answer(*made(vocabulary), "triton")
    assert len(tuned[1]) == 6
    test_without_a_gradient_logits_stay_as_they_are(100)
    assert len(tuned[1]) == 9


def test_every_configuration_gives_the_loss_and_gradient_of_plain_torch(tuned, monkeypatch):
    hidden, head = made(100)
    plain = answer(hidden, head, "plain", **OPTIONS["all"])
    for config in tuned[0]:
        monkeypatch.setattr(KERNEL, "configs", [config])
        for ours, theirs in zip(
            answer(hidden, head, "triton", **OPTIONS["all"]), plain, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_call_of_few_elements_is_not_measured(tuned, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(KERNEL, "configs", tuned[0])
    monkeypatch.setattr(KERNEL, "cache", {})
    monkeypatch.setitem(vars(KERNEL), "do_bench", lambda *_, **__: pytest.fail("measured"))
    answer(*made(100), "triton")
    assert KERNEL.best_config is tuned[0][0]
