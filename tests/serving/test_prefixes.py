"""What was read before is read on from there, and never with other weights."""

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.bank import AdapterBank
from lorakit.serving.prefixes import SHORTEST, Prefixes
from lorakit.serving.requests import Use
from references import attach_random
from serving.engines import (
    adapters,
    asked,
    banked,
    engine_of,
    greedy_alone,
    word_tokenizer,
)
from tiny_models import build

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
CHOICES = [None, "small", "wide", "dora", {"small": 0.6, "wide": -0.5}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


def ask(engine, bank, tokenizer, choice, prompt, **how):
    """The answer, and how many tokens of the prompt were read before."""
    found = asked(bank, tokenizer, choice, prompt, **how)
    engine.submit([found.request])
    assert found.wait().finish == "length"
    return found.ids, found.deltas[0].cached_tokens


@sampled("family", ["llama", "bloom", "gpt2", "gemma2"], share=4)
def test_answers_are_those_of_the_whole_prompt(family, tokenizer):
    more = {"sliding_window": 4} if family == "gemma2" else {}
    bank = AdapterBank(build(family, **more))
    for name, adapter in adapters(family).items():
        bank.add(name, adapter)
    engine = engine_of(bank)
    for choice in CHOICES:
        for prompt, expected in ((PROMPT, 0), (PROMPT, 9), ([*PROMPT[:9], 20, 21, 22], 9)):
            ids, cached = ask(engine, bank, tokenizer, choice, prompt)
            assert cached == expected, choice
            assert ids == greedy_alone(bank, choice, prompt, 8)
    engine.close()


def test_a_conversation_goes_on_from_its_last_answer(tokenizer):
    bank = banked()
    engine = engine_of(bank)
    ids, _ = ask(engine, bank, tokenizer, "wide", PROMPT, max_tokens=6)
    turn = [*PROMPT, *ids, 30, 31]
    found, cached = ask(engine, bank, tokenizer, "wide", turn, max_tokens=6)
    engine.close()
    assert cached == len(PROMPT) + 5
    assert found == greedy_alone(bank, "wide", turn, 6)


def test_equal_prompts_that_come_together_are_read_once(tokenizer):
    bank = banked()
    engine = engine_of(bank)
    given = [asked(bank, tokenizer, "small", PROMPT) for _ in range(3)]
    engine.submit([each.request for each in given])
    for each in given:
        each.wait()
    engine.close()
    assert sorted(each.deltas[0].cached_tokens for each in given) == [0, 9, 9]
    assert {tuple(each.ids) for each in given} == {tuple(greedy_alone(bank, "small", PROMPT, 8))}


def test_after_a_reload_in_place_nothing_old_is_found(tokenizer):
    bank = banked()
    engine = engine_of(bank)
    old, _ = ask(engine, bank, tokenizer, "wide", PROMPT)
    other = build("llama")
    attach_random(other, seed=99, std=0.3, rank=4, targets=("all-linear",))
    bank.add("wide", lk.extract(other, "default"))
    new, cached = ask(engine, bank, tokenizer, "wide", PROMPT)
    assert cached == 0
    assert new == greedy_alone(bank, "wide", PROMPT, 8) != old
    bank.add("under another name", adapters()["wide"])
    same, cached = ask(engine, bank, tokenizer, "under another name", PROMPT)
    engine.close()
    assert (same, cached) == (old, 9)


def test_log_probabilities_of_the_prompt_need_all_of_it(tokenizer):
    bank = banked()
    engine = engine_of(bank)
    for _ in range(2):
        found = asked(bank, tokenizer, "small", PROMPT, prompt_logprobs=0)
        engine.submit([found.request])
        found.wait()
        assert len(found.deltas[0].prompt_tokens) == len(PROMPT)
        assert found.deltas[0].cached_tokens == 0
    engine.close()


def states(tokens):
    return [(torch.zeros(1, 1, tokens, 4), torch.zeros(1, 1, tokens, 4))]


def test_what_was_not_used_for_the_longest_time_goes():
    token_bytes = 2 * 4 * 4
    kept, use = Prefixes(32 * token_bytes), Use()
    texts = [[number, *range(100, 111)] for number in range(3)]
    for text in texts[:2]:
        kept.keep(use, text, states(12))
    assert kept.start(use, [*texts[0], 1])[0] == 12
    kept.keep(use, texts[2], states(12))
    assert kept.size_bytes == 24 * token_bytes
    assert [kept.start(use, [*text, 1])[0] for text in texts] == [12, 0, 12]
    longer = [*texts[0], 50, 51]
    kept.keep(use, longer, states(14))
    assert len(kept) == 2
    assert kept.start(use, [*longer, 1])[0] == 14
    kept.keep(use, texts[0][: SHORTEST - 1], states(SHORTEST - 1))
    kept.keep(use, list(range(40)), states(40))
    assert len(kept) == 2
