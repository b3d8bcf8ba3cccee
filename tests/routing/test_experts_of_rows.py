"""Experts that are given tokens (Switch, NLLB-MoE): rows have adapters of their own in them."""

import copy

import pytest
import torch

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import RouteError
from lorakit.routing.slots import Slots
from references import alone, attach_random, base_hash, checkpoint_blocks, outputs
from token_experts import FAMILIES, inputs, made

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

NAMES = ["a", None, "b", {"a": 0.5, "b": -1.0}, "a"]


def with_adapters(model, **config):
    for name in ("a", "b"):
        settings = {"targets": "all-linear", "rank": 2, "alpha": 8} | config
        attach_random(model, name, seed=ord(name), **settings)
        for _, parameter in adapter_parameters(model, name):
            parameter.data = parameter.data.to(model.dtype)
    return model


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_has_the_outputs_that_it_has_alone(family, dtype, error):
    model, batch = with_adapters(made(family, dtype)), inputs(len(NAMES))
    with lk.route(model, NAMES):
        mixed = outputs(model, batch)
    found = alone(model, batch, NAMES)
    size = float(found[0].abs().max())
    for mine, wanted in zip(mixed, found, strict=True):
        assert float((mine - wanted).abs().max()) < error * size
    # The experts' own updates are in it: without them a row has other outputs.
    lk.detach(model)
    with_adapters(model, exclude=("experts",))
    with lk.route(model, NAMES):
        assert not torch.allclose(outputs(model, batch)[0], mixed[0], atol=error * size)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_each_row_alone(family):
    model = with_adapters(made(family))
    for name in ("a", "b"):
        for _, parameter in adapter_parameters(model, name):
            parameter.requires_grad_()

    def gradients():
        found = [p.grad for name in ("a", "b") for _, p in adapter_parameters(model, name)]
        model.zero_grad()
        return found

    batch, names = inputs(3), ["b", None, "a"]
    with lk.route(model, names):
        model(**batch).logits.square().sum().backward()
    together = gradients()
    for row, name in enumerate(names):
        if name is not None:
            with lk.route(model, name):
                own = {key: x[row : row + 1] for key, x in batch.items()}
                model(**own).logits.square().sum().backward()
    apart = gradients()
    assert any(each is not None and bool(each.any()) for each in together)
    for mine, wanted in zip(together, apart, strict=True):
        # An expert that nobody chose has none.
        zero = torch.zeros(())
        mine, wanted = (zero if each is None else each for each in (mine, wanted))
        torch.testing.assert_close(mine, wanted.expand_as(mine), rtol=1e-8, atol=1e-8)


@pytest.mark.thorough
def test_blocks_that_are_computed_again_have_the_same_gradients():
    model, batch = with_adapters(made("switch")).train(), inputs(3)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_blocks(model, {"use_reentrant": False})
        for name in ("a", "b"):
            for _, parameter in adapter_parameters(model, name):
                parameter.requires_grad_()
        with lk.route(model, ["b", None, "a"]):
            model(**batch).logits.square().sum().backward()
        each = (p for name in ("a", "b") for _, p in adapter_parameters(model, name))
        found.append([None if p.grad is None else p.grad.clone() for p in each])
        model.zero_grad()
    for plain, again in zip(*found, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, rtol=1e-9)


@pytest.mark.thorough
def test_beams_of_a_row_have_its_adapters():
    model = with_adapters(made("switch"), exclude=("head",))
    prompts = inputs(3)["input_ids"]
    how = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    names = ["a", "b", None]
    with lk.route(model, names):
        together = model.generate(prompts, **how)
    for row, name in enumerate(names):
        with lk.route(model, name):
            mine = model.generate(prompts[row : row + 1], **how)[0]
        assert together[row].tolist()[: len(mine)] == mine.tolist()


@pytest.mark.thorough
def test_slots_of_a_server_have_them_too():
    model, batch = with_adapters(made("switch")), inputs(2)
    with lk.route(model, ["b", "a"]):
        wanted = outputs(model, batch)
    slots = Slots(model, 2)
    for slot, name in enumerate(("b", "a")):
        slots.join(slot, [(model._lorakit.adapters[name].updates, 1.0)])
    with slots.used(0, 2):
        assert torch.allclose(outputs(model, batch), wanted)


def test_an_adapter_that_leaves_takes_nothing_from_the_other():
    base = made("switch")
    bits, classes = base_hash(base), [type(module) for module in base.modules()]
    model, batch = with_adapters(base), inputs(2)
    with lk.route(model, ["b", None]):
        wanted = outputs(model, batch)
    lk.detach(model, "a")
    with lk.route(model, ["b", None]):
        assert torch.equal(outputs(model, batch), wanted)
    copied = copy.deepcopy(model)
    with lk.route(copied, ["b", None]):
        assert torch.equal(outputs(copied, batch), wanted)
    lk.detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert base_hash(model) == bits


def test_an_expert_that_is_called_by_itself_cannot_know_the_rows():
    model = with_adapters(made("switch"))
    experts = model.encoder.block[1].layer[1].mlp.experts
    refused = pytest.raises(RouteError, match=r"expert_1\.wi is given the tokens that chose")
    with lk.route(model, ["a", "b"]), refused:
        experts["expert_1"](torch.zeros(2, 16, dtype=torch.float64))
    refused = pytest.raises(
        RouteError, match=r"3 rows, but encoder.*experts was given inputs of 4 t"
    )
    with lk.route(model, ["a", "b", None]), refused:
        tokens = torch.zeros(4, 16, dtype=torch.float64)
        experts(tokens, torch.ones(4, 1, 3, dtype=torch.int64), torch.ones(4, 1))


@pytest.mark.thorough
def test_compiled_code_is_refused():
    model = with_adapters(made("switch"))
    adapters = {name: lk.extract(model, name) for name in ("a", "b")}
    lk.detach(model)
    compiled = torch.compile(model, backend="eager")
    bank = lk.AdapterBank(compiled)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    with bank.route(["a", "b"]), pytest.raises(RouteError, match="the rows cannot differ"):
        compiled(**inputs(2))
