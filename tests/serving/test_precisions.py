"""Servers whose base or adapters are held in another precision than float32."""

import pytest
import torch

import lorakit as lk
from lorakit.config.serve import ServeConfig
from lorakit.serving.serve import prepared
from references import attach_random
from serving.engines import asked, greedy_alone
from tiny_models import build


@pytest.fixture(scope="module")
def places(tiny_llama, tmp_path_factory):
    """A model whose layers 4-bit blocks fit, and a folder of an adapter for it."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("precisions")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = build("llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    attach_random(model, seed=1, std=0.3, rank=4, targets=("all-linear",))
    lk.extract(model).save(root / "adapters" / "mine")
    return root


def serving(places, **settings):
    return prepared(
        ServeConfig(model=str(places / "model"), adapters=places / "adapters", slots=3, **settings)
    )


@pytest.mark.parametrize(
    ("dtype", "own", "held"),
    [
        ("float32", None, torch.float32),
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
    ],
)
def test_slots_hold_adapters_in_the_base_s_precision_or_as_is_asked(places, dtype, own, held):
    engine, catalog = serving(places, dtype=dtype, adapter_dtype=own)
    engine.start()
    given = asked(catalog.bank, catalog.tokenizer, "mine", [5, 6, 7])
    engine.submit([given.request])
    assert given.wait().finish == "length"
    assert engine.close()
    numbers = sum(x.numel() for x in _buffers(engine.slots))
    assert {x.dtype for x in _buffers(engine.slots)} == {held}
    assert engine.slots.size_bytes == numbers * held.itemsize


def _buffers(slots):
    return [x for own in slots._inputs.values() for x in (own._a, *own._b.values())]


@pytest.mark.parametrize("form", ["4bit", "8bit"])
def test_a_quantized_base_answers_with_its_adapters_as_generate_does(places, form):
    engine, catalog = serving(places, quantize=form)
    assert any("int8" in str(x.dtype) for x in engine.model.state_dict().values())
    engine.start()
    given = [
        asked(catalog.bank, catalog.tokenizer, choice, prompt)
        for choice in (None, "mine")
        for prompt in ([5, 6, 7], [9, 8, 4, 11, 3])
    ]
    engine.submit([each.request for each in given])
    for each in given:
        assert each.wait().finish == "length", each.deltas[-1].error
    assert engine.close()
    for each in given:
        choice = next(iter(each.request.use.names), None)
        assert each.ids == greedy_alone(catalog.bank, choice, each.request.prompt, 8), choice
