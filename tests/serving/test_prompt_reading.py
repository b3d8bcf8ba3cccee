"""Prompts that come together are read in one pass as if alone, and beside answers in parts."""

import pytest
import torch
from transformers import DynamicCache

from covering import sampled
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.pace import CHUNK, Pace
from lorakit.serving.worker import Limits
from serving.engines import asked, banked, greedy_alone, word_tokenizer
from tiny_models import build

TEXTS = ([5, 9], [3, 8, 4, 7, 6, 11, 12, 10], [9, 8, 7, 6, 5, 4, 3])
BEGUN = (0, 5, 6)
CHOICES = ["dora", None, "small", "wide", {"small": 0.6, "wide": -0.5}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


@pytest.fixture
def bank():
    return banked()


def passes(model):
    """The shapes of what a model is given from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def submitted(engine, given):
    """Have requests be there before the engine begins."""
    engine.submit([each.request for each in given])
    engine.start()
    for each in given:
        each.wait()


@sampled("family", ["llama", "bloom", "gemma2", "opt", "gpt2"], share=2)
def test_rows_that_are_read_together_have_the_logits_and_states_of_each_alone(family):
    more = {"sliding_window": 4} if family == "gemma2" else {}
    decoder = Decoder(build(family, **more).eval())
    with torch.no_grad():
        caches = [DynamicCache() for _ in TEXTS]
        for text, cache, count in zip(TEXTS, caches, BEGUN, strict=True):
            if count:
                decoder.read(text[:count], cache)
        logits, own = decoder.read_together(TEXTS, caches)
        for text, row, cache in zip(TEXTS, logits, own, strict=True):
            alone = DynamicCache()
            torch.testing.assert_close(row, decoder.read(text, alone)[0], atol=1e-5, rtol=1e-4)
            assert cache.get_seq_length() == len(text)
            for mine, other in zip(cache.layers, alone.layers, strict=True):
                torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=1e-4)
    assert [cache.get_seq_length() for cache in caches] == list(BEGUN)


def test_prompts_of_like_lengths_are_read_in_one_pass_and_others_alone(bank, tokenizer):
    engine = Engine(bank.model, Limits(slots=8, prefill_tokens=64))
    shapes = passes(bank.model)
    texts = [[10 * at + token for token in range(3, 10 - at % 2)] for at in range(5)]
    how = {"max_tokens": 3}
    given = [asked(bank, tokenizer, c, t, **how) for c, t in zip(CHOICES, texts, strict=True)]
    long = asked(bank, tokenizer, "small", [7, 5] * 12, **how)
    told = asked(bank, tokenizer, "wide", texts[1], prompt_logprobs=0, **how)
    submitted(engine, [*given, long, told])
    engine.close()
    assert shapes[0] == (5, 7)
    assert {(1, 24), (1, 6)} <= set(shapes[1:4])
    for each, choice in zip([*given, long, told], [*CHOICES, "small", "wide"], strict=True):
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 3), choice


def test_prompts_that_go_on_from_what_was_read_are_read_together(bank, tokenizer):
    engine = Engine(bank.model, Limits(slots=4))
    begun = [[20 * at + token for token in range(3, 15)] for at in range(2)]
    first = [asked(bank, tokenizer, c, t) for c, t in zip(("small", "wide"), begun, strict=True)]
    submitted(engine, first)
    shapes = passes(bank.model)
    then = [
        asked(bank, tokenizer, "small", [*begun[0], 40, 41, 42]),
        asked(bank, tokenizer, "wide", [*begun[1][:10], 50, 51, 52, 53]),
    ]
    engine.submit([each.request for each in then])
    for each in then:
        each.wait()
    engine.close()
    assert (2, 4) in shapes
    for each, choice, cached in zip(then, ("small", "wide"), (12, 10), strict=True):
        assert each.deltas[0].cached_tokens == cached
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 8)


def test_beside_answers_a_prompt_is_read_in_the_parts_that_the_pace_allows(
    bank, tokenizer, monkeypatch
):
    engine = Engine(bank.model, Limits(slots=4, prefill_tokens=64))
    monkeypatch.setattr(engine.pace, "share", lambda most, **step: 4)
    running = asked(bank, tokenizer, "wide", [5, 6, 7], max_tokens=24)
    engine.submit([running.request])
    engine.start()
    running.next()
    shapes = passes(bank.model)
    texts = [[3 + at, *range(8, 21)] for at in range(3)]
    given = [asked(bank, tokenizer, "small", text, max_tokens=2) for text in texts]
    engine.submit([each.request for each in given])
    for each in (*given, running):
        each.wait()
    engine.close()
    # A token of the answer, and so many of each prompt.
    assert max(tokens for _, tokens in shapes) == 1 + 3 * 4
    for each in given:
        assert each.ids == greedy_alone(bank, "small", each.request.prompt, 2)
    assert running.ids == greedy_alone(bank, "wide", [5, 6, 7], 24)


def test_a_share_takes_as_long_as_a_step_and_three_quarters():
    pace = Pace()
    assert pace.share(256) == 256
    pace.stepped(12, 0.2)
    assert pace.share(256) == 256
    pace.read(512, 0.4, prompts=8)
    # 0.18 s and 2.5 ms a token: a step of 12 is 0.21 s, and 0.37 s are 75 tokens.
    for tokens in (256, 64, 32, 128):
        pace.stepped(12, 0.21)
        pace.read(tokens, 0.18 + 0.0025 * tokens)
    pace.read(512, 0.4, prompts=8)
    assert pace.share(256) == 72
    assert pace.share(40) == 40
    slow = Pace()
    slow.stepped(1, 0.01)
    slow.read(16, 1.0)
    assert slow.share(256) == CHUNK
