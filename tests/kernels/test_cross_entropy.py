"""The loss behind an output head: exact for all options together, and small."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import lorakit as lk
from covering import covering
from lorakit.kernels.cross_entropy import CHUNK_BYTES, head_cross_entropy
from lorakit.kernels.logit_transform import IDENTITY, LogitTransform

TOKENS, D, VOCABULARY = 7, 6, 37


class Model(nn.Module):
    """A head, and an embedding that may be tied to it."""

    def __init__(self, *, bias=True):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.lm_head = nn.Linear(D, VOCABULARY, bias=bias)


def frozen():
    return Model().requires_grad_(False)


def frozen_without_bias():
    return Model(bias=False).requires_grad_(False)


def trained():
    return Model()


def tied():
    model = Model(bias=False)
    model.lm_head.weight = model.embed.weight
    return model


def adapted():
    return attached(lk.LoRAConfig(targets=("lm_head",), rank=3, alpha=5, bias="lora"))


def copied():
    return attached(lk.LoRAConfig(targets=("embed",), modules_to_save=("lm_head",)))


def attached(config):
    model = Model()
    lk.attach(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


HEADS = (frozen, frozen_without_bias, trained, tied, adapted, copied)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 0.02},
    "all": {"label_smoothing": 0.1, "z_loss": 0.02},
    "each its own": {
        "label_smoothing": torch.linspace(0, 0.5, TOKENS),
        "z_loss": torch.linspace(0.1, 0, TOKENS),
    },
}

CHANGES: dict[str, Any] = {
    "multiplied": LogitTransform(scale=0.25),
    "capped": LogitTransform(cap=1.5),
    "both": LogitTransform(scale=-0.5, cap=2.0),
}


def asked(dtype, *, tokens=TOKENS, scale=2.0):
    """Hidden states, targets of which some are IGNORED, and weights."""
    torch.manual_seed(1)
    hidden = (torch.randn(tokens, D) * scale).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,))
    targets[[1, 4]] = -100
    return hidden, targets, torch.rand(tokens)


def expected(hidden, head, targets, weights, *, label_smoothing=0.0, z_loss=0.0, change=IDENTITY):
    """The same as plain torch computes it, all at once."""
    logits = head(hidden) * change.scale
    logits = logits if change.cap is None else change.cap * torch.tanh(logits / change.cap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    smoothing = torch.as_tensor(label_smoothing, dtype=logits.dtype)
    sharp, flat = (
        cross_entropy(logits, targets, reduction="none", label_smoothing=epsilon)
        for epsilon in (0.0, 1.0)
    )
    losses = (1 - smoothing) * sharp + smoothing * flat
    losses = losses + z_loss * logits.logsumexp(-1).square() * (targets >= 0)
    return (weights * losses).sum(), losses.detach()


def gradients(model, hidden):
    found = {"hidden": hidden.grad}
    found |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden.grad = None
    return found


def both(make, dtype, options, *, factor=3.0, chunk_tokens=4):
    """Total, losses and gradients of our loss, and those of plain torch."""
    torch.manual_seed(0)
    model = make().to(dtype)
    hidden, targets, weights = asked(dtype)
    results = []
    for compute in (head_cross_entropy, expected):
        more = {"chunk_tokens": chunk_tokens} if compute is head_cross_entropy else {}
        total, losses = compute(
            hidden, model.lm_head, targets, weights.to(dtype), **options, **more
        )
        (total * factor).backward()
        results.append((total.detach(), losses, gradients(model, hidden)))
    return results


def assert_equal(found, plain, **tolerance):
    for ours, theirs in zip(found[:2], plain[:2], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    assert found[2].keys() == plain[2].keys()
    for name, gradient in plain[2].items():
        torch.testing.assert_close(found[2][name], gradient, **tolerance)


@covering(
    ("make", "chunk_tokens"),
    itertools.product(HEADS, [1, 4, TOKENS, 1000, None]),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_loss_and_gradients_equal_plain_torch(make, chunk_tokens):
    for name in ("all", "each its own"):
        found, plain = both(make, torch.float64, OPTIONS[name], chunk_tokens=chunk_tokens)
        assert_equal(found, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
def test_loss_and_gradients_equal_plain_torch_in_float32(make):
    for options in OPTIONS.values():
        found, plain = both(make, torch.float32, options)
        assert_equal(found, plain, rtol=1e-5, atol=1e-6)


@covering(
    ("make", "change"),
    itertools.product(HEADS, CHANGES),
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changed_logits_have_the_loss_and_gradients_of_plain_torch(make, change):
    for dtype, rtol, atol in ((torch.float64, 1e-12, 1e-13), (torch.float32, 1e-5, 1e-6)):
        for options in OPTIONS.values():
            found, plain = both(make, dtype, options | {"change": CHANGES[change]})
            assert_equal(found, plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits_without_a_target_leave_no_trace(change):
    answer = torch.randn(2, 5)
    answer[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 0])
    answer.requires_grad_()
    total, losses = head_cross_entropy(
        answer, nn.Identity(), torch.tensor([1, -100]), torch.ones(2), change=CHANGES[change]
    )
    total.backward()
    assert torch.isfinite(losses).all()
    assert answer.grad is not None
    assert answer.grad[0].any()
    assert not answer.grad[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [frozen, trained, adapted], ids=lambda make: make.__name__)
def test_half_precision_rounds_logits_and_gradients_alone(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    hidden, targets, weights = asked(dtype)
    total, losses = head_cross_entropy(hidden, model.lm_head, targets, weights, chunk_tokens=4)
    assert total.dtype == losses.dtype == torch.float32
    plain_total, plain_losses = expected(hidden, model.lm_head, targets, weights)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=1e-6)
    total.backward()
    found = gradients(model, hidden)
    plain_total.backward()
    for name, gradient in gradients(model, hidden).items():
        assert found[name].dtype == gradient.dtype
        bound = 2 * torch.finfo(dtype).eps * gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=bound)


def test_many_chunks_in_half_precision_lose_no_small_terms():
    torch.manual_seed(0)
    model = trained().to(torch.bfloat16)
    hidden, targets, weights = asked(torch.bfloat16, tokens=160)
    sums = []
    for chunk_tokens in (1, 160):
        total, _ = head_cross_entropy(
            hidden, model.lm_head, targets, weights, chunk_tokens=chunk_tokens
        )
        total.backward()
        sums.append(gradients(model, hidden)["lm_head.weight"])
    torch.testing.assert_close(*sums, rtol=0.01, atol=0.01 * sums[1].abs().max().item())


@pytest.mark.parametrize("make", [frozen, adapted], ids=lambda make: make.__name__)
def test_without_gradients_the_losses_are_the_same(make):
    torch.manual_seed(0)
    model = make()
    hidden, targets, weights = asked(torch.float32)
    with_graph = head_cross_entropy(hidden, model.lm_head, targets, weights, **OPTIONS["all"])
    with torch.no_grad():
        without = head_cross_entropy(hidden, model.lm_head, targets, weights, **OPTIONS["all"])
    assert not without[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(with_graph, without, strict=True))
    assert not with_graph[1].requires_grad


def test_a_head_alone_can_be_trained():
    model = trained()
    hidden, targets, weights = asked(torch.float32)
    total, _ = head_cross_entropy(hidden.detach(), model.lm_head, targets, weights)
    total.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_parameters_that_take_no_part_get_no_gradient():
    model = adapted()
    lk.switch(model, None)
    hidden, targets, weights = asked(torch.float32)
    for x in (hidden, hidden.detach()):
        total, _ = head_cross_entropy(x, model.lm_head, targets, weights)
        total.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_target_all_is_zero(make, tokens):
    model = make()
    hidden = torch.full((tokens, D), torch.inf, requires_grad=True)
    targets = torch.full((tokens,), -100)
    total, losses = head_cross_entropy(hidden, model.lm_head, targets, torch.ones(tokens))
    assert total == 0
    assert not losses.any()
    if tokens == 0:
        total.backward()
        assert not hidden.grad.any()


def test_logits_that_are_not_finite_count_only_where_there_is_a_target():
    logits, targets, weights = torch.randn(3, 5), torch.tensor([1, -100, 2]), torch.ones(3)
    logits[1] = torch.tensor([torch.nan, torch.inf, 0, 0, 0])
    logits.requires_grad_()
    total, losses = head_cross_entropy(logits, nn.Identity(), targets, weights)
    total.backward()
    assert torch.isfinite(losses).all()
    assert logits.grad is not None
    assert not logits.grad[1].any()
    assert logits.grad[0].any()
    found = head_cross_entropy(logits, nn.Identity(), torch.tensor([1, 1, 2]), weights)
    assert found[1].isnan().tolist() == [False, True, False]


def test_a_loss_near_zero_keeps_its_digits():
    logits = torch.tensor([[40.0, 28.0, 26.0]])
    _, found = head_cross_entropy(logits, nn.Identity(), torch.tensor([0]), torch.ones(1))
    wide = cross_entropy(logits.double(), torch.tensor([0]), reduction="none")
    torch.testing.assert_close(found.double(), wide, rtol=1e-2, atol=0)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that an operation made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return made


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 100])
def test_rows_stay_together_for_heads_that_tell_them_apart(chunk_tokens):
    class ByRow(nn.Linear):
        def forward(self, x):
            assert x.shape[0] == 2
            return super().forward(x) * torch.tensor([1.0, -1.0])[:, None, None]

    head = ByRow(D, VOCABULARY).requires_grad_(False)
    hidden, targets, weights = asked(torch.float32, tokens=10)
    rows = hidden.view(2, 5, D), head, targets.view(2, 5), weights.view(2, 5)
    with Largest() as largest:
        found = head_cross_entropy(*rows, chunk_tokens=chunk_tokens)
    # Nothing but views of the weight is larger.
    assert largest.elements <= max(min(chunk_tokens, 10), D) * VOCABULARY
    found[0].backward()
    ours = gradients(head, hidden)
    logits = head(rows[0]).flatten(0, 1)
    plain = expected(logits, nn.Identity(), targets, weights)
    plain[0].backward()
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1].flatten(), plain[1])
    for name, gradient in gradients(head, hidden).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)


def test_a_head_with_a_forward_of_its_own_is_called(monkeypatch):
    # As accelerate gives it, where weights move between devices.
    head = nn.Linear(D, VOCABULARY).requires_grad_(False)
    hidden, targets, weights = asked(torch.float64)
    head.double()
    monkeypatch.setattr(head, "forward", lambda x: nn.Linear.forward(head, x) * 2)
    total, _ = head_cross_entropy(hidden, head, targets, weights)
    torch.testing.assert_close(total, expected(hidden, head, targets, weights.double())[0])


@pytest.mark.parametrize("make", HEADS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("change", [IDENTITY, CHANGES["both"]])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(make, change):
    model, chunk = make(), 2 * D
    hidden, targets, weights = asked(torch.float32, tokens=70)
    options = {**OPTIONS["all"], "chunk_tokens": chunk, "change": change}
    with Largest() as largest:
        total, _ = head_cross_entropy(hidden, model.lm_head, targets, weights, **options)
        total.backward()
    assert largest.elements == chunk * VOCABULARY


def test_a_chunk_has_as_many_tokens_as_there_is_room_for(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * VOCABULARY * 4)
    model = frozen()
    hidden, targets, weights = asked(torch.float32, tokens=70)
    with Largest() as largest:
        head_cross_entropy(hidden, model.lm_head, targets, weights)
    assert largest.elements == max(5 * VOCABULARY, hidden.numel())


def test_a_second_derivative_is_refused():
    hidden, targets, weights = asked(torch.float32)
    total, _ = head_cross_entropy(hidden, frozen().lm_head, targets, weights)
    (first,) = torch.autograd.grad(total.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_state_of_random_numbers_hangs_on_the_head_alone():
    model = adapted()
    hidden, targets, weights = asked(torch.float32)
    before = torch.get_rng_state()
    head_cross_entropy(hidden, model.lm_head, targets, weights)
    assert torch.equal(torch.get_rng_state(), before)
