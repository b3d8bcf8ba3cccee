"""Wrappers around a model: verbs and names are those of the model inside."""

import itertools

import pytest
import torch
from torch import nn

import lorakit as lk
from covering import covering
from lorakit.attachment.state import active_name, adapter_names
from lorakit.errors import AttachError
from references import base_hash, outputs, randomise
from tiny_models import build, example_inputs

INPUTS = example_inputs(build("llama"))


class Replicas(nn.Module):
    """A stand-in for DistributedDataParallel, which needs a group of processes."""

    def __init__(self, module, size=1):
        super().__init__()
        self.module = module
        self.size = size

    @property
    def process_group(self):
        return type("Group", (), {"size": lambda _: self.size})()

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


Replicas.__module__ = nn.parallel.DistributedDataParallel.__module__


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "replicas": Replicas,
    "compiled_replicas": lambda model: compiled(Replicas(model)),
    "replicas_of_compiled": lambda model: Replicas(compiled(model)),
}


@covering(("wrapper", "target"), itertools.product(WRAPPERS, ["q", "q_proj"]))
def test_every_verb_works_through_a_wrapper_with_the_models_own_names(wrapper, target, tmp_path):
    plain = build("llama")
    before = base_hash(plain)
    found = WRAPPERS[wrapper](plain)
    config = lk.LoRAConfig(rank=2, targets=(target,))
    assert str(lk.plan(found, config)) == str(lk.plan(build("llama"), config))
    lk.attach(found, config)
    randomise(found)
    want = outputs(plain, INPUTS)
    lk.extract(found).save(tmp_path / "a")
    loaded = lk.Adapter.load(tmp_path / "a")
    assert [site.path for site in loaded.sites] == [
        f"model.layers.{number}.self_attn.q_proj" for number in (0, 1)
    ]
    assert lk.merge(found).adapter == "default"
    torch.testing.assert_close(outputs(plain, INPUTS), want)
    lk.unmerge(found)
    lk.merge(found)
    lk.detach(found)
    assert base_hash(plain) == before
    assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    lk.attach(found, loaded)
    assert torch.equal(outputs(plain, INPUTS), want)
    assert adapter_names(found) == adapter_names(plain) == ("default",)
    with lk.route(found, None):
        assert active_name(found) is None
    bank = lk.AdapterBank(Replicas(plain))
    assert bank.model is plain


def parts_of(model, part):
    """Where a part of a model hangs, and under which names."""
    match part:
        case "backbone":
            return model, ["model"]
        case "blocks":
            return model.model.layers, ["0", "1"]


@pytest.mark.parametrize("part", ["blocks", pytest.param("backbone", marks=pytest.mark.thorough)])
def test_parts_that_are_compiled_by_themselves_go_by_their_own_names(part):
    found, plain = build("llama"), build("llama")
    base = outputs(found, INPUTS)
    holder, names = parts_of(found, part)
    for name in names:
        setattr(holder, name, compiled(getattr(holder, name)))
    config = lk.LoRAConfig(rank=2, targets=("q", "v"))
    assert str(lk.plan(found, config)) == str(lk.plan(plain, config))
    lk.attach(found, config)
    randomise(found)
    lk.attach(plain, lk.extract(found))
    # Checks of shapes, with which tests run, cannot be compiled.
    with torch.compiler.set_stance("force_eager"):
        want = outputs(found, INPUTS)
        torch.testing.assert_close(outputs(plain, INPUTS), want)
    # The merge's own measurement sees into what is compiled.
    assert lk.merge(found).logit_change < 1e-4
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(outputs(found, INPUTS), want)
        lk.detach(found)
        assert torch.equal(outputs(found, INPUTS), base)
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_a_layer_that_is_compiled_by_itself_is_refused_as_a_target():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = compiled(attention.q_proj)
    with pytest.raises(lk.errors.TargetError, match=r"layers\.0\.self_attn\.q_proj is a Optimized"):
        lk.attach(model, lk.LoRAConfig(targets=("q", "v")))
    lk.attach(model, lk.LoRAConfig(targets=("v",)))


def test_a_models_own_child_called_module_is_no_wrapper():
    class Box(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.Linear(4, 4))

    box = Box()
    lk.attach(box, lk.LoRAConfig(rank=1, targets=("module.0",)))
    assert [site.path for site in lk.extract(box).sites] == ["module.0"]


def test_training_through_a_wrapper_that_would_not_average_is_refused():
    model = build("llama")
    config = lk.LoRAConfig(rank=2, targets=("q",))
    with pytest.raises(AttachError, match="attach the adapter to the model first"):
        lk.attach(Replicas(model, size=2), config)
    assert adapter_names(model) == ()
    lk.attach(Replicas(model, size=2), config, trainable=False)
