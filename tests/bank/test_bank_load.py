"""AdapterBank.load: what is verified while its updates are being made, and what is remembered."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lorakit as lk
import lorakit.bank.bank
from lorakit.adapter import folder as formats
from lorakit.attachment.attach import fit_and_build
from lorakit.attachment.state import modules_of
from lorakit.errors import AdapterFileError
from references import attach_random, outputs
from tiny_models import build, example_inputs

WEIGHTS = "adapter_model.safetensors"


def made(family="llama", *, seed=0, **config):
    model = build(family)
    attach_random(model, seed=seed, **config)
    return lk.extract(model)


@pytest.fixture
def saved(tmp_path):
    return made(rank=2).save(tmp_path / "saved")


@pytest.fixture
def bank():
    return lk.AdapterBank(build("llama"))


def flip_last_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(bytes(data))


def while_built(monkeypatch, action):
    """Have an action run after a bank has made an adapter's updates, before they count."""
    build_updates = fit_and_build

    def wrapped(model, adapter, **how):
        ready = build_updates(model, adapter, **how)
        action(adapter)
        return ready

    monkeypatch.setattr(lorakit.bank.bank, "fit_and_build", wrapped)


def assert_empty(bank):
    assert bank.names == ()
    assert not any("@" in path for path, _ in bank.model.named_modules())


def test_a_wrong_hash_is_noticed_after_the_updates_were_made(bank, saved, monkeypatch):
    flip_last_bit(saved)
    built: list[Any] = []
    while_built(monkeypatch, built.append)
    with pytest.raises(AdapterFileError, match="the content hash is another"):
        bank.load("new", saved)
    assert built
    assert_empty(bank)


def test_a_wrong_hash_is_told_before_what_does_not_fit(saved):
    flip_last_bit(saved)
    other = lk.AdapterBank(build("gpt2"))
    with pytest.raises(AdapterFileError, match="the content hash is another"):
        other.load("new", saved)
    assert_empty(other)


def test_what_is_written_to_while_it_is_hashed_is_not_what_was_saved(bank, saved, monkeypatch):
    while_built(monkeypatch, lambda adapter: next(iter(adapter.tensors.values())).add_(1))
    with pytest.raises(AdapterFileError, match="the content hash is another"):
        bank.load("new", saved)
    assert_empty(bank)


def test_an_error_of_the_block_comes_out_where_the_hash_is_right(saved):
    def divide():
        with formats.reading(saved) as adapter:
            assert adapter.content_hash() == lk.Adapter.load(saved).content_hash()
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        divide()


def test_a_folder_that_changes_while_it_is_loaded_is_held_as_it_was(bank, saved, monkeypatch):
    before = lk.Adapter.load(saved).content_hash()
    while_built(monkeypatch, lambda _: made(seed=1, rank=3).save(saved, overwrite=True))
    bank.load("new", saved)
    assert lk.extract(bank.model, "new").content_hash() == before
    assert lk.Adapter.load(saved).content_hash() != before
    monkeypatch.undo()
    bank.load("new", saved)
    assert lk.extract(bank.model, "new").content_hash() == lk.Adapter.load(saved).content_hash()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_told(bank, tmp_path, dtype, value):
    folder = made(rank=2).save(tmp_path / "saved")
    (folder / "lorakit.json").unlink()  # whose hash would tell first
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    tensors[sorted(tensors)[-1]][-1, -1] = value
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(AdapterFileError, match="NaN or infinity in 1 of"):
        bank.load("new", folder)
    assert_empty(bank)


def test_a_file_in_place_of_a_folder_is_told(bank, saved):
    with pytest.raises(AdapterFileError, match="is one file of an adapter: give its folder"):
        bank.load("new", saved / WEIGHTS)
    with pytest.raises(AdapterFileError, match="there is no adapter folder"):
        bank.load("new", saved / "missing")


def test_a_base_that_got_another_layer_is_seen_by_the_next_load(bank, saved):
    bank.load("first", saved)
    bank.model.model.layers.append(copy.deepcopy(build("llama").model.layers[0]))
    with pytest.raises(AdapterFileError, match=r"layers\.2\.self_attn\.q_proj .*nothing for it"):
        bank.load("second", saved)
    del bank.model.model.layers[2]
    bank.load("second", saved)
    assert bank.names == ("first", "second")


def test_a_layer_that_was_exchanged_is_the_one_that_is_adapted(bank, saved):
    bank.load("first", saved)
    attention = bank.model.model.layers[0].self_attn
    old = attention.q_proj
    attention.q_proj = nn.Linear(old.in_features, old.out_features + 1, bias=False)
    with pytest.raises(AdapterFileError, match=rf"\({old.out_features + 1}, 2\) expected"):
        bank.load("second", saved)
    attention.q_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    bank.load("second", saved)
    assert "@second" in attention.q_proj.adapter_bank


def test_what_is_remembered_of_a_base_goes_with_detach_and_does_not_travel(bank, saved):
    bank.load("first", saved)
    state = bank.model._lorakit
    assert modules_of(bank.model) is state.modules
    again = copy.deepcopy(bank.model)
    assert again._lorakit.modules is None
    lk.AdapterBank(again).load("second", saved)
    assert again.model.layers[0].self_attn.q_proj.adapter_bank["@second"].parts
    lk.detach(bank.model)
    fresh = lk.AdapterBank(bank.model)
    fresh.load("second", saved)
    inputs = example_inputs(bank.model)
    with fresh.route("second"):
        found = outputs(fresh.model, inputs)
    single = build("llama")
    lk.attach(single, lk.Adapter.load(saved))
    assert torch.equal(found, outputs(single, inputs))


def test_layers_that_targets_name_are_missed_whatever_was_loaded_before(bank, tmp_path):
    for name, targets in (("qv", ("q", "v")), ("down", ("down",))):
        bank.load(name, made(rank=2, targets=targets).save(tmp_path / name))
    whole = made(rank=2, targets=("q", "v"))
    *sites, last = whole.sites
    kept = {name: t for name, t in whole.tensors.items() if not name.startswith(last.name)}
    short = dataclasses.replace(whole, sites=tuple(sites), tensors=kept)
    with pytest.raises(AdapterFileError, match=rf"{last.name}  is among the targets"):
        bank.load("short", short.save(tmp_path / "short"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_updates_are_in_the_models_mode_and_frozen_unless_asked(family, trainable, training):
    adapter = made(family, rank=2)
    model = build(family).train(training)
    lk.attach(model, adapter, trainable=trainable)
    inside = [m for path, m in model.named_modules() if "@default" in path]
    assert {m.training for m in inside} == {training}
    own = [p for path, p in model.named_parameters() if "@default" in path]
    assert own
    assert {p.requires_grad for p in own} == {trainable}


def test_the_models_state_names_each_update(bank, saved):
    bank.load("e.2e", saved)
    own = [name for name in bank.model.state_dict() if "@" in name]
    start = "model.layers.0.self_attn.q_proj.adapter_bank.@e%2E2e.whole"
    assert own[:2] == [f"{start}.lora_a", f"{start}.lora_b"]
    assert len(own) == len(lk.Adapter.load(saved).tensors)


def test_a_pickle_holds_each_tensor_once_although_one_file_held_all(bank, saved):
    bare = len(pickle.dumps(bank.model))
    bank.load("new", saved)
    tensors = lk.Adapter.load(saved).tensors
    per_tensor = 3000  # names, shapes and the modules around it
    assert len(pickle.dumps(bank.model)) < bare + bank.resident_bytes + per_tensor * len(tensors)
