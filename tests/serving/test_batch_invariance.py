"""In half precision an answer has the same bits alone and beside any others."""

import pytest
import torch

from covering import sampled
from lorakit.bank import AdapterBank
from lorakit.config.serve import ServeConfig
from lorakit.errors import ConfigError, ModelError
from lorakit.serving.attention_by_query import by_query, rows_by_query
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.step_attention import whole
from lorakit.serving.worker import Limits
from serving.engines import adapters, asked, engine_of, word_tokenizer
from tiny_models import build

PROMPTS = [[5, 9], [4, 3, 8, 11, 12], [3, 8, 4, 7, 6, 9, 11, 2, 30, 5, 17, 12], [8, 5, 6], [7] * 9]
CHOICES = ["small", None, "wide", {"small": 0.6, "wide": -0.5}, "wide"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_query_has_the_bits_that_it_has_alone(dtype):
    """In whichever parts the queries come, and with rows of whichever lengths beside them."""
    module = torch.nn.Module()
    vars(module).update(num_key_value_groups=3, is_causal=True, layer_idx=0)
    torch.manual_seed(0)
    made = (torch.randn(1, heads, 77, 16, dtype=dtype) for heads in (6, 2, 2))
    query, key, value = made
    found, _ = by_query(module, query, key, value, None)
    expected, _ = whole(module, query, key, value, None)
    close = CLOSE if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    torch.testing.assert_close(found, expected, **close)
    for cut in (1, 2, 30, 63, 64, 65, 76):
        first, _ = by_query(module, query[:, :, :cut], key[:, :, :cut], value[:, :, :cut], None)
        rest, _ = by_query(module, query[:, :, cut:], key, value, None)
        assert torch.equal(torch.cat([first, rest], 1), found)
    # Rows that end at one column, two of which are equally long, and one free slot.
    lengths = [40, 40, 0, 76]
    keys, values = (torch.randn(4, 2, 77, 16, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths):
        keys[row, :, -1 - length :] = key[0, :, : length + 1]
        values[row, :, -1 - length :] = value[0, :, : length + 1]
    queries = torch.cat([query[:, :, length : length + 1] for length in lengths])
    rows, _ = rows_by_query(lengths)(module, queries, keys, values, None)
    assert torch.equal(rows[:, 0], found[0, lengths])


def test_drawn_answers_are_the_same_alone_and_among_others(tokenizer):
    bank = half_bank()
    try:
        engine = engine_of(bank, slots=5, batch_invariant=True)
    except ModelError:
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


def test_where_it_can_not_be_a_server_is_refused():
    asked_for = Limits(batch_invariant=True)
    with pytest.raises(ModelError, match=r"depend on their batch: .*sdpa.*without batch_invariant"):
        Engine(build("bloom").bfloat16(), asked_for)
    with pytest.raises(ModelError, match="in another precision than the base's"):
        Engine(build("llama").bfloat16(), asked_for, adapter_dtype=torch.float32)


def test_it_is_so_only_if_it_is_asked_for():
    assert not Engine(build("llama").bfloat16()).decoder.is_invariant


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
        ServeConfig(model="smollm2", batch_invariant=True, compile="auto")
