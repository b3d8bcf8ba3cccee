"""AdapterBank's merged switch: from one adapter to another with the bits of a fresh merge."""

from typing import Any

import pytest
import torch

import lorakit as lk
from bank.test_bank import KINDS, answers, made
from lorakit.errors import MergeError
from references import attach_random, base_hash, outputs
from tiny_models import build, example_inputs


@pytest.fixture
def inputs():
    return example_inputs(build("llama"), rows=4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_over_another_has_the_bits_of_a_fresh_one(tied, dtype, inputs):
    def fresh():
        return build("llama", tie_word_embeddings=tied).to(dtype)

    kinds = KINDS | {"other head": {"rank": 1, "targets": ("head",)}}
    bank, fresh_hash = lk.AdapterBank(fresh()), {}
    for seed, (name, kind) in enumerate(kinds.items()):
        single = fresh()
        attach_random(single, seed=seed, **kind)
        bank.add(name, lk.extract(single))
        lk.merge(single, measure=False)
        fresh_hash[name] = (base_hash(single), outputs(single, inputs))
    for name in ("head", "other head", "all", "head", "down", "other head", "qv"):
        bank.merge(name)
        assert base_hash(bank.model) == fresh_hash[name][0]
        assert torch.equal(outputs(bank.model, inputs), fresh_hash[name][1])
        with pytest.raises(MergeError, match="merged already"):
            bank.merge(name)
    bank.unmerge()
    assert base_hash(bank.model) == base_hash(fresh())
    weights = bank.model.lm_head.weight, bank.model.model.embed_tokens.weight
    assert (weights[0] is weights[1]) == tied


def test_heads_and_biases_merge_over_each_other():
    bank = lk.AdapterBank(build("bert"))
    kinds: dict[str, dict[str, Any]] = {
        "lora": {"bias": "lora"},
        "all": {"bias": "all", "targets": ("k",)},
        "none": {},
    }
    hashes = {}
    for seed, (name, kind) in enumerate(kinds.items()):
        bank.add(name, made("bert", seed=seed, **kind))
        single = build("bert")
        lk.attach(single, made("bert", seed=seed, **kind))
        lk.merge(single, measure=False)
        hashes[name] = base_hash(single)
    for name in ("lora", "none", "all", "lora", "all", "none"):
        bank.merge(name)
        assert base_hash(bank.model) == hashes[name]
    bank.unmerge()
    assert base_hash(bank.model) == base_hash(build("bert"))


def test_a_merge_that_fails_half_way_gives_the_base_back(inputs, monkeypatch):
    from lorakit.methods.lora.update import LoRAUpdate

    bank = lk.AdapterBank(build("llama"))
    for seed, (name, kind) in enumerate(KINDS.items()):
        bank.add(name, made(seed=seed, **kind))
    bank.merge("head")
    real, calls = LoRAUpdate.merged, []

    def failing(self, layer, *, exact):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        yield from real(self, layer, exact=exact)

    monkeypatch.setattr(LoRAUpdate, "merged", failing)
    with pytest.raises(MemoryError):
        bank.merge("all")
    monkeypatch.undo()
    assert base_hash(bank.model) == base_hash(build("llama"))
    before = answers(bank, inputs)
    bank.merge("all")
    bank.unmerge()
    assert torch.equal(answers(bank, inputs), before)
