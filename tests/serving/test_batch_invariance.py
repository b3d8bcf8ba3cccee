"""In half precision an answer has the same bits alone and beside any others."""

import pytest
import torch
from transformers.integrations import sdpa_attention

from covering import sampled
from lorakit.bank import AdapterBank
from lorakit.config.serve import ServeConfig
from lorakit.errors import ConfigError, ModelError
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.row_windows import groups_of
from lorakit.serving.worker import Limits
from serving.engines import adapters, asked, engine_of, word_tokenizer
from tiny_models import build

PROMPTS = [[5, 9], [4, 3, 8, 11, 12], [3, 8, 4, 7, 6, 9, 11, 2, 30, 5, 17, 12], [8, 5, 6], [7] * 9]
CHOICES = ["small", None, "wide", {"small": 0.6, "wide": -0.5}, "wide"]
OTHERWISE = "this processor computes many rows in half precision otherwise than each of them"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


def half_bank():
    """The adapters of tests on a base in bfloat16 whose drawn tokens notice the last bit."""
    model = build("llama").bfloat16()
    bank = AdapterBank(model)
    for name, adapter in adapters().items():
        bank.add(name, adapter)
    return bank


def drawn(bank, tokenizer, number):
    """One of the requests, drawn at random by a seed, with the probabilities of its tokens."""
    how = {
        "sampling": {"temperature": 1.0, "seed": number, "alternatives": 0},
        "max_tokens": 6 + number,
    }
    return asked(bank, tokenizer, CHOICES[number % 5], PROMPTS[number % 5], **how)


def answers(given):
    """The tokens of answers with their log-probabilities, to the bit."""
    return [[(t.id, t.logprob) for d in each.deltas for t in d.tokens] for each in given]


@pytest.fixture
def products_by_row(monkeypatch):
    """Matrix products whose rows are computed one by one, as not every processor does in effect."""
    whole = torch.nn.functional.linear

    def by_row(x, weight, bias=None):
        rows = [whole(row[None], weight, bias) for row in x.reshape(-1, x.shape[-1])]
        return torch.cat(rows).view(*x.shape[:-1], -1)

    monkeypatch.setattr(torch.nn.functional, "linear", by_row)


@sampled("family", ["llama", "opt", "qwen3", "gpt_neox"], share=2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_rows_have_the_bits_that_each_has_alone(family, dtype, products_by_row):
    decoder = Decoder(build(family).to(getattr(torch, dtype)))
    decoder.prove()
    if decoder.make_invariant() is not None:
        pytest.skip(OTHERWISE)
    assert decoder.is_invariant
    assert not decoder.reads_together


@torch.no_grad()
def test_rows_that_see_hidden_columns_are_found(products_by_row, monkeypatch):
    whole = sdpa_attention.sdpa_attention_forward

    def rounded(module, query, key, value, mask, **kwargs):
        part, weights = whole(module, query, key, value, mask, **kwargs)
        # As where hidden columns change the order of sums.
        hides = mask is not None and query.shape[2] == 1
        return part * (1 + 2**-7) if hides else part, weights

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", rounded)
    decoder = Decoder(build("llama").bfloat16())
    decoder.prove()
    assert decoder.joins
    if decoder.make_invariant() is not None:
        pytest.skip(OTHERWISE)
    monkeypatch.setattr("lorakit.serving.decoder.equal_groups", groups_of)
    assert "matrix products" in str(decoder.make_invariant())


def test_drawn_answers_are_the_same_alone_and_among_others(tokenizer):
    bank = half_bank()
    engine = engine_of(bank, slots=5)
    if not engine.decoder.is_invariant:
        engine.close()
        pytest.skip(OTHERWISE)
    alone = []
    for number in range(10):
        each = drawn(bank, tokenizer, number)
        engine.submit([each.request])
        each.wait()
        alone.append(each)
    among = [drawn(bank, tokenizer, number) for number in reversed(range(10))]
    engine.submit([each.request for each in among])
    for each in among:
        each.wait()
    engine.close()
    assert engine.joint.count
    assert answers(among[::-1]) == answers(alone)


def test_where_it_can_not_be_it_is_told_or_refused():
    notes: list[str] = []
    model = build("bloom").bfloat16()
    assert not Engine(model, note=notes.append).decoder.is_invariant
    assert notes[0].startswith("the answers of this BloomForCausalLM depend on their batch")
    with pytest.raises(ModelError, match="leave batch_invariant at auto"):
        Engine(model, Limits(batch_invariant="on"))


@pytest.mark.parametrize("how", [{"batch_invariant": "off"}, {"compile": "auto"}])
def test_it_is_not_so_where_it_is_not_wanted_or_steps_are_compiled(how):
    engine = Engine(build("llama").bfloat16(), Limits(**how))
    engine.steps.close()
    assert not engine.decoder.is_invariant


def test_other_precisions_have_it_only_if_it_is_asked_for(monkeypatch):
    tried = []
    monkeypatch.setattr(Decoder, "make_invariant", lambda self: tried.append(self.model.dtype))
    Engine(build("llama"))
    assert not tried
    Engine(build("llama"), Limits(batch_invariant="on"))
    assert tried == [torch.float32]


@torch.no_grad()
def test_products_that_differ_by_rows_are_found(monkeypatch):
    decoder = Decoder(build("llama").bfloat16())
    decoder.prove()
    whole = torch.nn.functional.linear

    def wrong(x, weight, bias=None):
        # As where another kernel computes a single row.
        out = whole(x, weight, bias)
        return out if x.shape[:-1].numel() > 1 else out * (1 + 2**-7)

    monkeypatch.setattr(torch.nn.functional, "linear", wrong)
    assert "matrix products" in str(decoder.make_invariant())
    assert not decoder.is_invariant
    assert decoder.reads_together


def test_compiled_steps_can_not_be_demanded_with_it():
    with pytest.raises(ConfigError, match="leave one of them off"):
        ServeConfig(model="smollm2", batch_invariant="on", compile="auto")
    assert ServeConfig(model="smollm2", compile="auto").batch_invariant == "auto"
