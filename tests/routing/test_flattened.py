"""One row of many requests: each token has its request's adapter."""

import pytest
import torch

import lorakit as lk
from lorakit.bank import AdapterBank
from lorakit.errors import RouteError
from references import attach_random
from serving.engines import KINDS
from tiny_models import build

REQUESTS = [("wide", 5), (None, 3), ({"small": 0.5, "wide": -1.0}, 1), ("dora", 4), ("wide", 1)]
CHOICES = [choice for choice, _ in REQUESTS]
LENGTHS = [length for _, length in REQUESTS]


@pytest.fixture(scope="module")
def bank():
    model = build("llama")
    for seed, (name, config) in enumerate(KINDS.items()):
        attach_random(model, name, seed=seed, std=0.3, **config)
    lk.switch(model, None)
    return AdapterBank(model)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 60, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def positions():
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


@torch.no_grad()
def test_each_request_in_one_row_is_computed_as_alone(bank, ids):
    with bank.route(CHOICES, lengths=LENGTHS):
        found = bank.model(input_ids=ids, position_ids=positions(), use_cache=False).logits[0]
    for (choice, length), part, own in zip(
        REQUESTS, ids.split(LENGTHS, 1), found.split(LENGTHS), strict=True
    ):
        with bank.route(choice):
            alone = bank.model(input_ids=part, use_cache=False).logits[0]
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=1e-4, msg=f"{choice}, {length}")


def test_gradients_of_one_row_are_those_of_rows_alone(ids):
    model = build("llama")
    attach_random(model, "one", std=0.3, rank=2)
    attach_random(model, "two", std=0.3, seed=1, rank=5)
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    lengths, names = [6, 8], ["two", "one"]
    with lk.route(model, names, lengths=lengths):
        where = torch.cat([torch.arange(length) for length in lengths])[None]
        logits = model(input_ids=ids, position_ids=where, use_cache=False).logits
        logits.square().sum().backward()
    found = [p.grad.clone() for p in parameters]
    model.zero_grad()
    for name, part in zip(names, ids.split(lengths, 1), strict=True):
        with lk.route(model, name):
            model(input_ids=part, use_cache=False).logits.square().sum().backward()
    for own, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(own, parameter.grad, atol=1e-3, rtol=1e-3)


def test_what_is_wrong_with_lengths_is_told(bank, ids):
    for names, lengths, message in [
        (["wide", None], [3], "1 lengths for 2 choices"),
        ("wide", [3], "1 lengths for one choice for all"),
        (["wide", None], [3, 0], "found 0"),
    ]:
        with pytest.raises(RouteError, match=message), bank.route(names, lengths=lengths):
            pass
    with bank.route(["wide", None], lengths=[3, 4]):
        with pytest.raises(RouteError, match="one row of 7 tokens"):
            bank.model(input_ids=ids)
        with pytest.raises(RouteError, match="for 1 rows"):
            bank.model(input_ids=ids.expand(2, -1))


def test_virtual_tokens_are_refused():
    model = build("llama")
    attach_random(model, "one", rank=2)
    lk.attach(model, lk.PrefixConfig(prefix=2, infix=0), name="tokens")
    choices = ["one", "tokens"]
    with pytest.raises(RouteError, match="virtual"), lk.route(model, choices, lengths=[3, 4]):
        pass
