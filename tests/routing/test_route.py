"""Routes and switches: what they choose, restore and refuse, and their gradients."""

import copy
import inspect
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lorakit as lk
from lorakit.attachment.state import active_name
from lorakit.errors import MergeError, RouteError
from lorakit.routing import choices
from lorakit.routing.choices import RowChoices
from references import alone, attach_random, base_hash, checkpoint_blocks, outputs, randomise
from tiny_models import build, example_inputs

NAMES = ["two", None, "one", "two"]
COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


def adapted(family="llama", *, blocks=None, **config):
    """A model with two adapters that change much; the base answers."""
    model = build(family, **({} if blocks is None else {"num_hidden_layers": blocks}))
    attach_random(model, "one", std=0.5, rank=2, **config)
    attach_random(model, "two", std=0.5, seed=1, rank=5, targets=("q", "down"), **config)
    lk.switch(model, None)
    return model


@pytest.fixture
def model():
    return adapted()


@pytest.fixture
def inputs(model):
    return example_inputs(model, rows=4)


def test_routes_nest_and_restore_what_was_there(model, inputs):
    lk.switch(model, "one")
    before = outputs(model, inputs)
    with lk.route(model, NAMES):
        mixed = outputs(model, inputs)
        with lk.route(model, None):
            base = outputs(model, inputs)
            with pytest.raises(ZeroDivisionError), lk.route(model, ["two"] * 4):
                raise ZeroDivisionError
            assert torch.equal(outputs(model, inputs), base)
        assert torch.equal(outputs(model, inputs), mixed)
        assert active_name(model) is None
    assert torch.equal(outputs(model, inputs), before)
    assert active_name(model) == "one"
    torch.testing.assert_close(mixed[1], base[1])
    # One choice for all rows has no length.
    with lk.route(model, "two"):
        outputs(model, example_inputs(model, rows=3))


def test_a_switch_inside_a_route_ends_with_it(model, inputs):
    base = outputs(model, inputs)
    with lk.route(model, NAMES):
        lk.switch(model, "one")
        inside = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), base)
    lk.switch(model, "one")
    assert torch.equal(outputs(model, inputs), inside)


def test_a_switch_is_a_pointer_change(model):
    parameters = {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()}
    modules = [id(m) for m in model.modules()]
    lk.switch(model, "two")
    assert model._lorakit.route.top.operations is model._lorakit.adapters["two"].updates
    assert {n: (p.data_ptr(), p._version) for n, p in model.named_parameters()} == parameters
    assert [id(m) for m in model.modules()] == modules


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["onr", "x", "one", "twoo"], "'onr'; did you mean 'one'.*'x'.*'twoo'; did you mean 'two'"),
        ({"onr": 0.0}, "'onr'"),
        ([], "no rows"),
        ([{"one": float("nan")}], "row 0 asks for 'one' with weight nan"),
    ],
)
def test_a_wrong_choice_is_told_before_anything_changes(model, inputs, names, message):
    before = outputs(model, inputs)
    with pytest.raises(RouteError, match=message), lk.route(model, names):
        raise AssertionError
    assert torch.equal(outputs(model, inputs), before)


@pytest.mark.parametrize("names", [["one"] * 3, ["one", "two", None], ["one", "two"], ["one"]])
def test_a_batch_of_another_length_is_refused(model, inputs, names):
    with lk.route(model, names):
        for call in (lambda: model(**inputs), lambda: model(inputs["input_ids"])):
            with pytest.raises(RouteError, match=rf"for {len(names)} rows.* 4 rows"):
                call()
        with pytest.raises(RouteError, match=rf"for {len(names)} rows.* 4 rows"):
            model.generate(**inputs, max_new_tokens=2)


def test_a_route_and_a_merge_exclude_each_other(model, inputs):
    hashed = base_hash(model)
    with lk.route(model, NAMES), pytest.raises(MergeError, match="a route is open"):
        lk.merge(model, "one")
    assert base_hash(model) == hashed
    lk.merge(model, "one")
    with pytest.raises(RouteError, match="merged"), lk.route(model, None):
        pass
    with pytest.raises(MergeError, match="merged"):
        lk.switch(model, None)


def test_everything_works_in_inference_mode(model, inputs):
    with lk.route(model, NAMES):
        expected = outputs(model, inputs)
    with torch.inference_mode(), lk.route(model, NAMES):
        assert torch.equal(model(**inputs).logits, expected)
        model.generate(**inputs, max_new_tokens=2, num_beams=2, pad_token_id=0)
    with torch.inference_mode():
        made = adapted()
        with lk.route(made, NAMES):
            assert torch.equal(made(**inputs).logits, expected)
        randomise(made, "two", seed=8)
        with lk.route(made, NAMES):
            assert not torch.equal(made(**inputs).logits, expected)


def _step(model, layer):
    layer.lora_a.requires_grad_(True)
    layer.lora_a.grad = torch.ones_like(layer.lora_a)
    torch.optim.SGD([layer.lora_a], lr=1.0).step()
    layer.lora_a.requires_grad_(False)


def _load(model, layer):
    state = {k: v + 1 if "lora_a" in k else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def _data(model, layer):
    # Twice, so that torch may give out the first address again.
    for _ in range(2):
        layer.lora_a.data = layer.lora_a.data.clone() + 1


def _precision(model, layer):
    model.half().float()


def _parameter(model, layer):
    layer.lora_b = torch.nn.Parameter(layer.lora_b + 1, requires_grad=False)


@pytest.mark.parametrize("operation", [_step, _load, _data, _precision, _parameter])
def test_a_weight_that_changed_between_two_routes_is_never_served_old(model, inputs, operation):
    model.requires_grad_(False)
    with lk.route(model, NAMES):
        before = outputs(model, inputs)
    operation(model, model.model.layers[0].self_attn.q_proj.adapter_bank["@two"].parts["whole"])
    with lk.route(model, NAMES):
        after = outputs(model, inputs)
    assert not torch.equal(after, before)
    for found, expected in zip(after, alone(model, inputs, NAMES), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_a_mixed_batch_are_right_under_checkpointing(inputs, reentrant):
    def gradients(model):
        with lk.route(model, NAMES):
            model(**inputs).logits.square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = adapted(dtype="float32").double().train()
    twin = copy.deepcopy(model)
    expected = gradients(model)
    settings = {"use_reentrant": reentrant}
    checkpoint_blocks(twin, settings)
    found = gradients(twin)
    assert found.keys() == expected.keys() > set()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_runs_under_the_route_of_its_forward_pass(inputs, reentrant):
    """Two passes under different routes, one without gradients between, then one backward pass."""

    def gradients(model):
        with lk.route(model, NAMES):
            loss = model(**inputs).logits.square().sum()
        lk.switch(model, "one")
        loss = loss + model(**inputs).logits.square().sum()
        lk.switch(model, "two")
        with torch.no_grad():
            model(**inputs)
        loss.backward()
        assert active_name(model) == "two"
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    model = adapted(dtype="float32").double().train()
    twin = copy.deepcopy(model)
    expected = gradients(model)
    settings = {"use_reentrant": reentrant}
    checkpoint_blocks(twin, settings)
    found = gradients(twin)
    assert found.keys() == expected.keys() > set()
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("names", [NAMES, "one"], ids=["mixed", "single"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_of_ones_own_is_not_recomputed_under_another_route(
    model, inputs, reentrant, names
):
    model.train().requires_grad_(True)

    def run(embedded):
        return model(inputs_embeds=embedded).logits.sum()

    def loss():
        embedded = model.get_input_embeddings()(inputs["input_ids"])
        return checkpoint(run, embedded, use_reentrant=reentrant)

    with lk.route(model, names):
        found = loss()
    with pytest.raises(RouteError, match="inside its `with` block"):
        found.backward()
    with lk.route(model, ["one", None, None, None]):
        with lk.route(model, names):
            found = loss()
        with pytest.raises(RouteError):
            found.backward()
    lk.switch(model, "one")
    found = loss()
    lk.switch(model, "two")
    with pytest.raises(RouteError, match="the route of the forward pass is over"):
        found.backward()


def test_backward_after_the_block_is_right_without_checkpointing(model, inputs):
    with lk.route(model, NAMES):
        model(**inputs).logits.sum().backward()
        inside = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        loss = model(**inputs).logits.sum()
    loss.backward()
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert after.keys() == inside.keys()
    assert all(torch.equal(after[n], inside[n]) for n in inside)


@pytest.mark.parametrize("make", COPIES, ids=["copy", "pickle"])
def test_a_copy_made_inside_a_route_is_outside_of_it(model, inputs, make):
    lk.switch(model, "one")
    expected = outputs(model, inputs)
    with lk.route(model, NAMES):
        mixed = outputs(model, inputs)
        twin = make(model)
        assert torch.equal(outputs(model, inputs), mixed)
        assert torch.equal(outputs(twin, inputs), expected)
    fewer = {k: v[:3] for k, v in inputs.items()}
    torch.testing.assert_close(outputs(twin, fewer), expected[:3])
    lk.switch(twin, "two")
    assert active_name(twin) == "two"
    with lk.route(twin, NAMES):
        assert torch.equal(outputs(twin, inputs), mixed)
    assert torch.equal(outputs(model, inputs), expected)
    lk.detach(twin)
    assert not twin._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_change_its_precision_between_routes(model, inputs, dtype):
    with lk.route(model, NAMES):
        outputs(model, inputs)
    model.to(dtype)
    with lk.route(model, NAMES):
        mixed = outputs(model, inputs)
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-9
    for found, expected in zip(mixed, alone(model, inputs, NAMES), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_a_route_of_trained_adapters_outlives_their_steps(model, inputs, monkeypatch):
    made = []
    original = RowChoices.among
    monkeypatch.setattr(RowChoices, "among", lambda *a: made.append(a) or original(*a))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(3):
        model.zero_grad()
        with lk.route(model, NAMES):
            logits = model(**inputs).logits
            logits.square().mean().backward()
        if step == 0:
            first = len(made)
        with torch.no_grad():
            for found, own in zip(logits, alone(model, inputs, NAMES), strict=True):
                torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
        optimizer.step()
    assert 0 < first == len(made)
    # One that is frozen meanwhile is copied, and a later write to it is seen all the same.
    for parameter in trained:
        parameter.requires_grad_(False)
    with lk.route(model, NAMES):
        before = outputs(model, inputs)
    with torch.no_grad():
        trained[0].add_(1.0)
    with lk.route(model, NAMES):
        assert not torch.equal(outputs(model, inputs), before)
    assert len(made) > first


def test_detaching_inside_a_route_leaves_the_base(model, inputs):
    plain = build("llama")
    with lk.route(model, NAMES):
        lk.detach(model)
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs))
    assert base_hash(model) == base_hash(plain)


@pytest.mark.parametrize("wrong", [7, ["one"], {"one": "much"}, {"one": None}], ids=str)
def test_a_choice_of_a_wrong_kind_is_told(wrong):
    # Unwrapped, because the shape checks of the tests would see it first.
    with pytest.raises(RouteError, match=r"row 1 asks for .*: give a name, None"):
        inspect.unwrap(choices._combination)(wrong, 1)


@pytest.mark.thorough
def test_compiled_models_answer_and_train_alike(forks):
    # Apart, without the shape checks of the tests, which are not for compiling.
    forks.run("""
import torch, lorakit as lk
from routing.test_route import NAMES, adapted
from tiny_models import example_inputs
model = adapted(blocks=1)
inputs = example_inputs(model, rows=4)
compiled = torch.compile(model, backend="eager")
parameters = [p for p in model.parameters() if p.requires_grad]

def gradients(model):
    loss = model(**inputs).logits.square().sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

for names in (NAMES, "one"):
    with lk.route(model, names):
        wanted = model(**inputs).logits, *gradients(model)
        torch.testing.assert_close((compiled(**inputs).logits, *gradients(compiled)), wanted)
lk.AdapterBank(compiled)
for names in (NAMES, "one", [{"one": 0.5}] * 4):
    with lk.route(compiled, names):
        found = compiled(**inputs).logits, *gradients(compiled)
    with lk.route(model, names):
        model._lorakit.compiled = False
        torch.testing.assert_close(found, (model(**inputs).logits, *gradients(model)))
        model._lorakit.compiled = True
""")


DDP = """
import os, torch, torch.distributed as dist, torch.multiprocessing as mp
import lorakit as lk
from routing.test_route import adapted
from tiny_models import example_inputs

ROUTES = (["one", None], ["two", "one"])

def gradients(model, inputs, names):
    with lk.route(model, names):
        model(**inputs).logits.square().mean().backward()

def run(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = adapted()
    inputs = example_inputs(model, rows=4)
    mine = {k: v[rank * 2 : rank * 2 + 2] for k, v in inputs.items()}
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    gradients(wrapped, mine, ROUTES[rank])
    plain = adapted()
    gradients(plain, inputs, ROUTES[0] + ROUTES[1])
    wanted = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    dist.destroy_process_group()
"""


@pytest.mark.thorough
def test_processes_with_other_routes_average_their_gradients(tmp_path, forks):
    (tmp_path / "ddp_routes.py").write_text(DDP)
    forks.run(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch.multiprocessing as mp
from ddp_routes import run
mp.start_processes(run, args=({str(tmp_path / "rendezvous")!r},), nprocs=2, start_method="fork")
""")
