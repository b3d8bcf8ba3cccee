"""The loss of texts is what plain torch finds from all logits, whatever the model does to them."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lorakit as lk
from covering import covering, sampled
from lorakit.kernels.choice import use
from lorakit.kernels.cross_entropy import CHUNK_BYTES
from lorakit.kernels.packed_sequences import FEW_SIZES
from lorakit.training import lm_loss as objective
from lorakit.training.lm_loss import item_weight, text_losses
from references import attach_random
from shaped_models import SHAPED, with_shaped_logits
from tiny_models import FAMILIES, VOCABULARY, build, example_inputs

LANGUAGE = [
    family
    for family in FAMILIES
    if build(family).get_output_embeddings() is not None and "bert" not in family
]
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.02}


def batch(model, *, rows=3):
    """Inputs, and labels that leave out other tokens in each row."""
    inputs = example_inputs(model, rows=rows)
    labels = inputs.get("decoder_input_ids", inputs["input_ids"]).clone()
    labels[0, :2] = -100
    labels[1, 2:] = -100
    labels[2:, -1] = -100
    return inputs, labels


def plain(model, inputs, labels, *, label_smoothing=0.0, z_loss=0.0):
    """The mean loss and each position's, from the logits of all positions."""
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    losses = cross_entropy(
        logits.mT.double(), targets, reduction="none", label_smoothing=label_smoothing
    )
    losses = losses + z_loss * logits.double().logsumexp(-1).square() * (targets != -100)
    return losses.sum() / (targets != -100).sum(), losses


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def check(model, inputs, labels, *, called=None):
    """Compare loss, losses and gradients with plain torch, in float64."""
    model.double()
    loss, _ = text_losses(
        called or model, inputs, labels, weights=item_weight(labels, None), **OPTIONS
    )
    loss.backward()
    found = gradients(model)
    wanted, losses = plain(model, inputs, labels, **OPTIONS)
    wanted.backward()
    tolerance: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(loss, wanted, **tolerance)
    _, each = text_losses(model, inputs, labels, **OPTIONS)
    torch.testing.assert_close(each[:, :-1], losses.detach(), **tolerance)
    assert not each[:, -1].any()
    expected = gradients(model)
    assert found.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **tolerance)


def hand_over(model):
    """The numbers of positions that the head saw in a pass, and how many have a label."""
    inputs, labels = batch(model)
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, output: seen.append(output[..., 0].numel()))
    text_losses(model, inputs, labels)
    hook.remove()
    targets = int((labels[:, 1:] != -100).sum())
    return seen, targets + -targets % FEW_SIZES


@sampled("family", LANGUAGE)
def test_every_family_has_the_loss_of_plain_torch(family):
    model = build(family).double()
    attach_random(model, targets=("attention",), rank=2)
    check(model, *batch(model))


@sampled("family", LANGUAGE)
def test_the_head_sees_only_what_predicts_a_label(family):
    model = build(family)
    seen, targets = hand_over(model)
    # The probe and the empty inputs of the model and the loss, which cost nothing.
    assert seen == [3, 0, 0, targets]
    assert hand_over(model)[0] == [0, 0, targets]


@pytest.mark.parametrize("family", SHAPED)
def test_logits_that_the_model_changes_are_made_in_chunks_too(family, monkeypatch):
    model = with_shaped_logits(family).double()
    seen, targets = hand_over(model)
    assert seen == [3, 0, 0, targets]
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * VOCABULARY * 8)
    assert hand_over(model)[0] == [0, 0] + [5] * (targets // 5) + [targets % 5]


@pytest.mark.parametrize("family", SHAPED)
def test_a_change_that_no_config_names_is_the_models_own(family, monkeypatch):
    monkeypatch.setattr(objective, "logit_transform", lambda *_, **__: None)
    model = with_shaped_logits(family).double()
    seen, targets = hand_over(model)
    assert seen == [targets]
    attach_random(model, targets=("q_proj", "head"), rank=2)
    check(model, *batch(model))


ADAPTED: dict[str, Any] = {
    "trained with its embedding": None,
    "adapted": {"targets": ("q_proj", "head"), "rank": 3},
    "copied": {"targets": ("q_proj",), "modules_to_save": ("lm_head",)},
}


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("ties", [True, False])
def test_trained_heads_have_the_gradients_of_plain_torch(adapted, ties):
    model = build("llama", tie_word_embeddings=ties).double()
    if ADAPTED[adapted] is not None:
        attach_random(model, **ADAPTED[adapted])
    check(model, *batch(model))


@covering(
    ("family", "ties", "adapted"),
    itertools.product(SHAPED, [True, False], [*ADAPTED, "frozen"]),
)
def test_changed_logits_have_the_gradients_of_plain_torch(family, ties, adapted, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 5 * VOCABULARY * 8)
    model = with_shaped_logits(family, tie_word_embeddings=ties).double()
    options = {"targets": ("q_proj",)} if adapted == "frozen" else ADAPTED[adapted]
    if options is not None:
        attach_random(model, **options)
    check(model, *batch(model))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_rows_with_heads_of_their_own_have_the_gradients_of_plain_torch(family):
    model = build(family).double()
    attach_random(model, "a", targets=("q", "head"), rank=3)
    attach_random(model, "b", seed=1, targets=("head",), rank=2)
    attach_random(model, "c", seed=2, targets=("q",), modules_to_save=("lm_head",))
    inputs, labels = batch(model, rows=5)
    with lk.route(model, ["a", None, "b", {"a": 0.5, "b": 2.0}, "c"]):
        check(model, inputs, labels)


class Compiled(nn.Module):
    """Stands for torch.compile's wrapper, which the checks of shapes in tests would confuse."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model
        self.forward = model.forward


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_a_model_whose_hooks_cannot_be_relied_on_computes_its_logits(wrap):
    model = build("llama").double()
    attach_random(model)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape[:2]))
    inputs, labels = batch(model)
    check(model, inputs, labels, called=wrap(model))
    assert seen[0] == labels.shape


def test_a_model_without_an_output_head_computes_its_logits(monkeypatch):
    model = build("llama").double()
    attach_random(model)
    monkeypatch.setattr(objective, "output_head", lambda _: None)
    check(model, *batch(model))


def test_packed_rows_are_as_good_as_any():
    model = build("llama").double()
    attach_random(model)
    inputs, labels = batch(model)
    packed = {
        "input_ids": inputs["input_ids"].reshape(1, -1),
        "position_ids": torch.arange(7).repeat(3)[None],
    }
    labels[:, 0] = -100
    check(model, packed, labels.reshape(1, -1))


def test_no_label_at_all_gives_zero_and_no_gradient():
    model = build("llama")
    attach_random(model, targets=("q", "head"))
    inputs, labels = batch(model)
    none = torch.full_like(labels, -100)
    loss, _ = text_losses(model, inputs, none, weights=item_weight(none, 0))
    loss.backward()
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients(model).values())


def test_rows_have_their_own_options():
    model = build("llama").double()
    attach_random(model)
    inputs, labels = batch(model)
    weights, smoothing, z = (torch.tensor(v) for v in ([1.0, 0.5, 2], [0, 0.1, 0.3], [0.1, 0, 0]))
    total, losses = text_losses(
        model, inputs, labels, weights=weights, label_smoothing=smoothing, z_loss=z
    )
    expected = 0
    for row in range(3):
        mine = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        options = {"label_smoothing": smoothing[row].item(), "z_loss": z[row].item()}
        _, each = plain(model, mine, labels[row : row + 1], **options)
        torch.testing.assert_close(losses[row : row + 1, :-1], each, rtol=1e-6, atol=1e-6)
        expected += weights[row] * each.sum()
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_a_forward_pass_that_fails_leaves_no_hook_behind():
    model = build("llama")
    inputs, labels = batch(model)
    wrong = inputs | {"input_ids": inputs["input_ids"] + VOCABULARY}
    expected = text_losses(model, inputs, labels)[1]
    with pytest.raises(IndexError):
        text_losses(model, wrong, labels)
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(text_losses(model, inputs, labels)[1], expected)
    assert model(**inputs).logits.shape[:2] == labels.shape


@pytest.mark.parametrize("per_row", [False, True])
def test_plain_kernels_give_the_same_loss_and_gradients_from_all_logits(per_row):
    model = build("llama").double()
    attach_random(model)
    model.double()
    inputs, labels = batch(model)
    options: dict[str, Any] = {"weights": 0.25, **OPTIONS}
    if per_row:
        rows = len(labels)
        options = {name: torch.linspace(v, v / 2, rows).double() for name, v in options.items()}
    found = []
    for kind in ("auto", "plain"):
        with use(kind):
            total, losses = text_losses(model, inputs, labels, **options)
        total.backward()
        found.append((total.detach(), losses, gradients(model)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-11)
    assert found[0][2]
