"""The joint pass: each adapter gets the loss and the gradients that it would get alone."""

import itertools
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import lorakit as lk
from covering import covering
from lorakit.attachment.attach import adapter_parameters
from lorakit.config.methods import LoRAConfig
from lorakit.data.batches import training_batch
from lorakit.data.collate import Collator
from lorakit.data.samples import Example
from lorakit.training.loss import Loss
from lorakit.training.sweep.joint_step import MicroBatch, joint_losses
from tiny_models import build

ADAPTERS = {
    "small": LoRAConfig(rank=1, targets=("q", "v")),
    "large": LoRAConfig(rank=8, alpha=32, targets=("all-linear",)),
    "odd": LoRAConfig(rank=3, targets=("k", "mlp"), layers="1"),
}


def examples(name, *, classes=0):
    """Rows whose number and lengths differ between the adapters."""
    draw = torch.Generator().manual_seed(len(name) + ord(name[0]))
    rows = []
    for row in range({"small": 1, "large": 4, "odd": 2}[name]):
        length = 4 + (row * 5 + len(name)) % 9
        ids = torch.randint(3, 16, (length,), generator=draw).tolist()
        prompt = 1 + row % (length - 2)
        labels = row % classes if classes else [-100] * prompt + ids[prompt:]
        rows.append(Example(input_ids=ids, labels=labels))
    return rows


def gradients(model, name):
    found = {n: p.grad for n, p in adapter_parameters(model, name)}
    assert all(gradient is not None for gradient in found.values())
    return found


def alone(model, batch):
    """The loss and gradients of one adapter by itself, as plain torch computes them."""
    model.zero_grad()
    inputs = {k: v for k, v in batch.inputs.items() if k != "labels"}
    with lk.route(model, batch.name):
        logits = model(**inputs).logits
        if batch.loss.objective is None:
            loss = loss_of_texts(logits, batch)
        else:
            loss = batch.loss(logits, batch.inputs["labels"], num_items_in_batch=batch.items)
        loss.backward()
    return loss.detach(), gradients(model, batch.name)


def loss_of_texts(logits, batch):
    logits, targets = logits[:, :-1].flatten(0, 1), batch.inputs["labels"][:, 1:].flatten()
    smoothing = batch.loss.label_smoothing
    found = cross_entropy(logits, targets, reduction="sum", label_smoothing=smoothing)
    found = found + batch.loss.z_loss * logits[targets != -100].logsumexp(-1).square().sum()
    return found / batch.items


def check_gradients(model, batches, *, rtol, atol):
    expected = {batch.name: alone(model, batch) for batch in batches}
    model.zero_grad()
    losses = joint_losses(model, batches, pad_id=0)
    for batch, loss in zip(batches, losses, strict=True):
        torch.testing.assert_close(loss, expected[batch.name][0], rtol=rtol, atol=atol)
        found = gradients(model, batch.name)
        for name, gradient in expected[batch.name][1].items():
            torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=atol, msg=name)


def with_adapters(model, changes_of=None, **changes):
    for number, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(number)
        own = changes | (changes_of or {}).get(name, {})
        lk.attach(model, config.model_copy(update=own), name=name)
        # With B at zero A would have no gradient.
        for path, parameter in adapter_parameters(model, name):
            if path.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.05)
    return model


TOLERANCE = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-5)}


OF_THE_HEAD = {
    "none": {},
    "some": {"large": {"targets": ("q", "head")}, "odd": {"targets": ("head",), "layers": None}},
    "a copy": {"small": {"modules_to_save": ("lm_head",)}, "odd": {"targets": ("k",)}},
}


@covering(
    ("dtype", "adapted", "family"), itertools.product(TOLERANCE, OF_THE_HEAD, ["llama", "gemma2"])
)
def test_gradients_of_language_models_equal_those_alone(dtype, adapted, family):
    # Gemma 2 caps its logits behind the head.
    model = build(family, attn_implementation="eager")
    with_adapters(model, OF_THE_HEAD[adapted]).to(dtype)
    batches = [
        MicroBatch(
            name=name,
            inputs=training_batch(examples(name), pad_id=0),
            loss=Loss("generation", label_smoothing=0.1 * number, z_loss=0.01 * number),
            items=7 + number,
        )
        for number, name in enumerate(ADAPTERS)
    ]
    rtol, atol = TOLERANCE[dtype]
    check_gradients(model, batches, rtol=rtol, atol=atol)


@covering(("family", "dtype"), itertools.product(["bert", "roberta", "gpt2"], TOLERANCE))
def test_gradients_of_classifiers_with_own_heads_equal_those_alone(family, dtype):
    head = "ForSequenceClassification"
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = with_adapters(build(family, head=head, num_labels=3, **off), bias="lora").to(dtype)
    loss = Loss("classification")
    batches = [
        MicroBatch(
            name=name,
            inputs=training_batch(examples(name, classes=3), pad_id=0),
            loss=loss,
            items=None,
        )
        for name in ADAPTERS
    ]
    assert any("classifier" in n or "score" in n for n, _ in adapter_parameters(model, "odd"))
    rtol, atol = TOLERANCE[dtype]
    check_gradients(model, batches, rtol=rtol, atol=atol)


def test_nan_in_one_adapter_leaves_the_others_bits_alone(tiny_llama):
    model, tokenizer = lk.load_model(str(tiny_llama))
    with_adapters(model)
    collate = Collator(tokenizer)
    batches = [
        MicroBatch(name=name, inputs=collate(examples(name)), loss=Loss("generation"), items=9)
        for name in ADAPTERS
    ]
    before = joint_losses(model, batches, pad_id=0)
    kept = {name: {n: g.clone() for n, g in gradients(model, name).items()} for name in ADAPTERS}
    model.zero_grad()
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "large"):
            parameter.fill_(math.nan)
    after = joint_losses(model, batches, pad_id=0)
    assert after[1].isnan()
    for number, name in ((0, "small"), (2, "odd")):
        assert torch.equal(before[number], after[number])
        for path, gradient in gradients(model, name).items():
            assert torch.equal(gradient, kept[name][path]), path
