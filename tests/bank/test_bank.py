"""AdapterBank: what comes and goes, what it costs, and that nobody notices the others."""

import dataclasses
import gc
import shutil
import threading
import weakref
from typing import Any

import pytest
import torch

import lorakit as lk
from calls import calls_in
from lorakit.errors import AdapterFileError, BankError, RouteError
from references import alone, attach_random, base_hash, outputs
from tiny_models import build, example_inputs

KINDS: dict[str, dict[str, Any]] = {
    "qv": {"rank": 2},
    "all": {"rank": 5, "targets": ("all-linear",), "use_rslora": True},
    "head": {"rank": 3, "targets": ("embed", "head"), "dtype": "bfloat16"},
    "down": {"rank": 2, "targets": ("down",), "layers": "1"},
}


def made(family="llama", *, seed=0, name="default", **config):
    """An adapter with random weights."""
    model = build(family)
    attach_random(model, name, seed=seed, **config)
    return lk.extract(model, name)


@pytest.fixture(scope="module")
def adapters():
    return {name: made(seed=seed, **kind) for seed, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def folders(adapters, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: adapter.save(root / name) for name, adapter in adapters.items()}


@pytest.fixture
def bank():
    return lk.AdapterBank(build("llama"))


@pytest.fixture
def full(bank, folders):
    """A bank with all adapters."""
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


@pytest.fixture
def inputs(bank):
    return example_inputs(bank.model, rows=4)


ROWS = ["all", "qv", None, "down"]


def answers(bank, inputs, names=ROWS):
    with bank.route(names):
        return outputs(bank.model, inputs)


def test_adapters_of_all_kinds_live_side_by_side(full, folders, inputs):
    assert full.names == full.resident == tuple(KINDS)
    assert len(full) == 4
    assert "qv" in full
    for name, folder in folders.items():
        single = build("llama")
        lk.attach(single, lk.Adapter.load(folder))
        assert torch.equal(answers(full, inputs, name), outputs(single, inputs))
        assert lk.extract(full.model, name).content_hash() == lk.Adapter.load(folder).content_hash()
    names = ["qv", "all", "head", "down"]
    for found, expected in zip(
        answers(full, inputs, names), alone(full.model, inputs, names), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(outputs(full.model, inputs), outputs(build("llama"), inputs))


def test_the_bytes_are_those_of_the_tensors_and_go_to_zero(full, adapters):
    assert full.resident_bytes == sum(a.size_bytes for a in adapters.values())
    for name in KINDS:
        full.unload(name)
    assert full.resident_bytes == 0
    assert full.names == full.resident == ()
    assert sum("lora_" in name for name, _ in full.model.named_parameters()) == 0


def test_loading_touches_no_other_adapter_and_rebuilds_no_module(bank, folders, inputs):
    bank.load("qv", folders["qv"])
    lk.switch(bank.model, "qv")
    before = outputs(bank.model, inputs)
    modules = {path: id(m) for path, m in bank.model.named_modules()}
    weights = {n: (p.data_ptr(), p._version) for n, p in bank.model.named_parameters()}
    for name in ("all", "head", "down"):
        bank.load(name, folders[name])
    after = {path: id(m) for path, m in bank.model.named_modules()}
    assert modules.items() <= after.items()
    found = {n: (p.data_ptr(), p._version) for n, p in bank.model.named_parameters()}
    assert weights.items() <= found.items()
    assert torch.equal(outputs(bank.model, inputs), before)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.thorough
def test_the_cost_of_a_change_does_not_grow_with_the_residents(family):
    bank = lk.AdapterBank(build(family))
    kind = {"targets": ("all-linear",)} if family == "llama" else {}
    adapter = made(family, rank=2, **kind)

    def cost(name):
        bank.add(name, adapter)
        with bank.route([name, None]):
            pass
        bank.merge(name)
        bank.unmerge()
        lk.extract(bank.model, name)

    cost("warm")
    first = len(calls_in(lambda: cost("first")))
    for number in range(40):
        bank.add(f"more {number}", adapter)
    assert len(calls_in(lambda: cost("last"))) <= first * 1.02 + 50


def test_the_same_content_is_not_loaded_twice_and_other_content_replaces_it(
    bank, folders, adapters, inputs, tmp_path
):
    copy = shutil.copytree(folders["qv"], tmp_path / "copy")
    bank.load("name", folders["qv"])
    kept = bank.model._lorakit.adapters["name"].updates
    bank.load("name", copy)
    assert bank.model._lorakit.adapters["name"].updates is kept
    bank.switch("name")
    old = outputs(bank.model, inputs)
    adapters["down"].save(copy, overwrite=True)
    bank.load("name", copy)
    new = outputs(bank.model, inputs)
    assert not torch.equal(new, old)
    single = build("llama")
    lk.attach(single, adapters["down"])
    assert torch.equal(new, outputs(single, inputs))
    assert bank.resident_bytes == adapters["down"].size_bytes


@pytest.mark.parametrize("mode", ["route", "switched"])
def test_new_content_waits_for_the_end_of_an_open_route(bank, folders, inputs, mode):
    bank.load("name", folders["qv"])
    if mode == "switched":
        bank.switch("name")
    with bank.route(["name", None, "name", None]):
        before = outputs(bank.model, inputs)
        thread = threading.Thread(target=bank.load, args=("name", folders["down"]))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert torch.equal(outputs(bank.model, inputs), before)
    single = build("llama")
    lk.attach(single, lk.Adapter.load(folders["down"]))
    found = answers(bank, inputs, "name") if mode == "route" else outputs(bank.model, inputs)
    assert torch.equal(found, outputs(single, inputs))


def damaged(kind, folder):
    file = next(folder.glob("*.safetensors"))
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif kind == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    else:
        file.unlink()


def changed(kind, adapter):
    tensors = {k: v.clone() for k, v in adapter.tensors.items()}
    first = next(iter(tensors))
    if kind == "nan":
        tensors[first][0, 0] = float("nan")
    elif kind == "missing":
        del tensors[first]
    elif kind == "shape":
        tensors[first] = tensors[first][:, :-1]
    else:
        other = build("llama", seed=1)
        attach_random(other)
        return lk.extract(other)
    return dataclasses.replace(adapter, tensors=tensors)


@pytest.mark.parametrize(
    "kind", ["truncated", "flipped", "gone", "nan", "missing", "shape", "other base"]
)
def test_a_bad_adapter_is_an_error_of_its_own(full, folders, adapters, inputs, kind, tmp_path):
    before, names, size = answers(full, inputs), full.names, full.resident_bytes
    for name in ("qv", "new"):
        if kind in ("truncated", "flipped", "gone"):
            folder = shutil.copytree(folders["all"], tmp_path / name)
            damaged(kind, folder)
            with pytest.raises(AdapterFileError):
                full.load(name, folder)
        else:
            with pytest.raises(AdapterFileError):
                full.add(name, changed(kind, adapters["all"]))
    assert (full.names, full.resident_bytes) == (names, size)
    assert torch.equal(answers(full, inputs), before)
    assert not any("@new" in path for path, _ in full.model.named_modules())


def limited(adapters, folders, *names):
    """A bank with room for the named adapters, and loaded with them."""
    budget = sum(adapters[name].size_bytes for name in names)
    bank = lk.AdapterBank(build("llama"), budget_bytes=budget)
    for name in names:
        bank.load(name, folders[name])
    return bank


def test_what_was_used_least_recently_goes_and_comes_back(adapters, folders, inputs):
    bank = limited(adapters, folders, "qv", "all")
    expected = answers(bank, inputs, "qv")
    answers(bank, inputs, "all")
    bank.load("down", folders["down"])
    assert bank.resident == ("all", "down")
    assert bank.names == ("qv", "all", "down")
    assert bank.resident_bytes <= bank.budget_bytes
    assert torch.equal(answers(bank, inputs, "qv"), expected)
    assert "all" not in bank.resident
    # What has just come is not what goes next.
    bank = limited(adapters, folders, "qv", "down")
    answers(bank, inputs, "qv")
    bank.load("again", folders["down"])
    assert bank.resident == ("qv", "again")
    bank.budget_bytes = None
    bank.load("down", folders["down"])
    assert len(bank.resident) == 3


def test_what_was_attached_and_then_loaded_comes_back_too(adapters, folders, inputs):
    model = build("llama")
    lk.attach(model, folders["qv"], name="qv")
    lk.switch(model, None)
    bank = lk.AdapterBank(model, budget_bytes=adapters["all"].size_bytes)
    expected = answers(bank, inputs, "qv")
    bank.load("qv", folders["qv"])
    bank.load("all", folders["all"])
    assert bank.resident == ("all",)
    assert torch.equal(answers(bank, inputs, "qv"), expected)
    assert bank.hold("qv").content_hash == adapters["qv"].content_hash()


def test_what_is_pinned_switched_to_merged_or_in_a_route_stays(adapters, folders, inputs):
    bank = limited(adapters, folders, "qv", "down")
    bank.pin("qv")
    bank.switch("down")
    with pytest.raises(BankError, match="too small for it beside qv, down, which"):
        bank.load("all", folders["all"])
    assert bank.resident == ("qv", "down")
    bank.switch(None)
    bank.merge("down")
    with pytest.raises(BankError, match="too small"):
        bank.load("all", folders["all"])
    bank.unmerge()
    bank.switch(None)
    with bank.route(["down"] * 4), pytest.raises(BankError, match="too small"):
        bank.load("third", folders["qv"])
    bank.unpin("qv")
    bank.load("third", folders["qv"])
    assert bank.resident == ("down", "third")


def test_a_budget_smaller_than_one_adapter_is_told_and_evicts_nothing(adapters, folders, inputs):
    bank = limited(adapters, folders, "qv", "down")
    before = answers(bank, inputs, ["qv", "down", None, "qv"])
    with pytest.raises(BankError, match=r"'all' takes [\d,]+ bytes, and the budget of"):
        bank.load("all", folders["all"])
    assert bank.names == bank.resident == ("qv", "down")
    assert torch.equal(answers(bank, inputs, ["qv", "down", None, "qv"]), before)
    bank.budget_bytes = adapters["qv"].size_bytes
    bank.load("third", folders["qv"])
    with pytest.raises(BankError, match="too small"), bank.route(["qv", "third", None, None]):
        pass
    answers(bank, inputs, "third")


def test_a_folder_that_changed_or_went_is_an_error_of_its_adapter_alone(
    adapters, folders, inputs, tmp_path, monkeypatch
):
    moved = {n: shutil.copytree(folders[n], tmp_path / n) for n in ("qv", "down")}
    bank = lk.AdapterBank(build("llama"), budget_bytes=adapters["all"].size_bytes)
    monkeypatch.chdir(tmp_path)
    bank.load("qv", "qv")
    bank.load("down", moved["down"])
    monkeypatch.chdir(tmp_path.parent)
    expected = answers(bank, inputs, "qv")
    bank.load("all", folders["all"])
    assert bank.resident == ("all",)
    before = answers(bank, inputs, "all")
    adapters["head"].save(moved["down"], overwrite=True)
    with pytest.raises(AdapterFileError, match="holds another adapter than when 'down'"):
        bank.route("down").__enter__()
    shutil.rmtree(moved["down"])
    with pytest.raises(AdapterFileError):
        bank.switch("down")
    assert torch.equal(answers(bank, inputs, "all"), before)
    assert torch.equal(answers(bank, inputs, "qv"), expected)


def test_what_cannot_be_unloaded_is_told(full):
    full.pin("qv")
    for name, message in (("qv", "pinned"), ("dwon", "'dwon'; did you mean 'down'")):
        with pytest.raises(BankError, match=message):
            full.unload(name)
    full.switch("all")
    with pytest.raises(BankError, match="switched to"):
        full.unload("all")
    full.merge("down")
    for action in (full.unload, lambda name: full.add(name, made(seed=9))):
        with pytest.raises(BankError, match="'down' is merged"):
            action("down")
    for action in (full.pin, full.unpin, full.switch, full.merge):
        with pytest.raises(BankError, match="no adapter 'al'; did you mean 'all'"):
            action("al")
    with pytest.raises(RouteError, match=r"'x'.*'heda'; did you mean 'head'"):
        full.route(["x", "heda", "qv", None]).__enter__()
    full.unmerge()
    full.unpin("qv")
    full.switch(None)
    for name in KINDS:
        full.unload(name)


def test_memory_of_what_went_is_free_again(full, inputs):
    found = {
        name: weakref.ref(next(iter(each.updates.values())))
        for name, each in full.model._lorakit.adapters.items()
    }
    with full.route(ROWS):
        full.model(**inputs)
        full.unload("down")
        assert outputs(full.model, inputs).isfinite().all()
    full.switch("all")
    full.model(**inputs)
    full.switch(None)
    for name in ("qv", "all", "head"):
        full.unload(name)
    gc.collect()
    assert [name for name, reference in found.items() if reference() is not None] == []


def test_a_bank_holds_what_was_attached_before_it(inputs, folders, tmp_path):
    model = build("llama")
    attach_random(model, "trained", rank=2)
    saved = lk.extract(model).save(tmp_path / "trained")
    bank = lk.AdapterBank(model, budget_bytes=10**6)
    bank.load("qv", folders["qv"])
    assert bank.names == ("trained", "qv")
    expected = answers(bank, inputs, "trained")
    with torch.no_grad():
        for parameter in model._lorakit.adapters["trained"].updates[0].parameters():
            parameter.add_(1)
    # The name holds other weights now than those in the folder.
    bank.load("trained", saved)
    assert torch.equal(answers(bank, inputs, "trained"), expected)


def test_detach_gives_the_base_back_although_there_was_a_bank(full, inputs):
    plain = build("llama")
    full.merge("all")
    lk.detach(full.model, "qv")
    assert full.resident == ("all", "head", "down")
    lk.detach(full.model)
    assert base_hash(full.model) == base_hash(plain)
    assert [type(m) for m in full.model.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(outputs(full.model, inputs), outputs(plain, inputs))
    with pytest.raises(BankError, match="make a new bank"):
        answers(full, inputs)
    assert lk.AdapterBank(full.model).names == ()


def test_what_lk_detach_took_out_comes_back_from_its_folder(full, inputs):
    before = answers(full, inputs)
    lk.detach(full.model, "qv")
    assert torch.equal(answers(full, inputs), before)
    full.add("memory", made(seed=5))
    lk.detach(full.model, "memory")
    with pytest.raises(BankError, match="has no folder"):
        answers(full, inputs, "memory")
    full.unload("memory")


def test_a_bank_is_shown_in_one_line(adapters, folders):
    model = build("llama")
    bank = lk.AdapterBank(model, budget_bytes=2 * max(a.size_bytes for a in adapters.values()))
    assert repr(bank).startswith("AdapterBank(empty; 0.0 of 0.")
    first, *_ = folders
    bank.load(first, folders[first])
    bank.switch(first)
    assert repr(bank).startswith(f"AdapterBank({first}; ")
    assert repr(bank).endswith(f"MB in memory; {first} in use)")
    assert bank.active == first
    bank.add("memory", adapters[first])
    bank.merge("memory")
    assert repr(bank).endswith("memory (merged) in use)")
