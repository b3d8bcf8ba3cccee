"""Answers to batches of prompts: rows of a route, ends of their own, options of the base."""

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import lorakit as lk
from lorakit.answering.answer import RandomSampling, answer, fitted
from lorakit.answering.beam_search import BeamSearch
from lorakit.answering.ends import ends_of_rows
from lorakit.attachment.state import attachment_of
from lorakit.config.methods import LoRAConfig, PrefixConfig
from lorakit.errors import ConfigError, RouteError
from lorakit.routing.slot_content import Terms
from lorakit.routing.slots import Slots
from references import randomise
from tiny_tokenizers import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(pad_token="</s>")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A model with three adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        initializer_range=0.3,
    )
    made = LlamaForCausalLM(config).eval()
    for seed, name in enumerate(["one", "two"]):
        lk.attach(made, LoRAConfig(targets=("q", "v")), name=name)
        randomise(made, name, seed=seed, std=0.5)
    lk.attach(made, PrefixConfig(prefix=4, infix=2, every_layer=False), name="prefix")
    randomise(made, "prefix", seed=3)
    lk.switch(made, None)
    return made


def end_at(model: Any, name: str, *tokens: int) -> None:
    """Have an adapter's card say that its targets ended in these tokens."""
    state = attachment_of(model)
    assert state is not None
    record = state.adapters[name].record
    card = {**record.card, "end_tokens": list(tokens)}
    state.adapters[name] = replace(state.adapters[name], record=replace(record, card=card))


PROMPTS = [[9, 8, 7, 6, 5], [4], [12, 11, 10], [15, 14], [20, 21, 22, 23], [9]]
NAMES = ["one", None, "two", {"one": 0.5, "two": 0.5}, "prefix", "one"]
SEARCHES = [None, BeamSearch(beams=3)]


@pytest.mark.parametrize("search", SEARCHES, ids=["greedy", "beams"])
def test_rows_of_a_route_keep_their_adapters_and_ends_in_any_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, search: BeamSearch | None
) -> None:
    def asked(prompts: list[list[int]], **options: Any) -> list[str]:
        return answer(model, tokenizer, prompts, max_new_tokens=8, search=search, **options)

    free = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        with lk.route(model, name):
            free += asked([prompt])
    # An end that one adapter's answers have, and others' too.
    end_at(model, "one", *range(30, 45))
    end_at(model, "two", *range(45, 60))
    alone = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        with lk.route(model, name):
            alone += asked([prompt])
    assert sum(a != b for a, b in zip(alone, free, strict=True)) >= 2
    for batch_size in (16, 2):
        with lk.route(model, NAMES):
            assert asked(PROMPTS, batch_size=batch_size) == alone


def test_beams_use_the_slots_that_the_batches_share(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    join = Slots.join

    def noted(self: Slots, slot: int, terms: Terms) -> None:
        written.append(slot)
        join(self, slot, terms)

    monkeypatch.setattr(Slots, "join", noted)
    names = ["one", None, "two", {"one": 0.5, "two": 0.5}, "two", "one"]
    ask = {"max_new_tokens": 8, "search": BeamSearch(beams=3)}
    alone = []
    for prompt, name in zip(PROMPTS, names, strict=True):
        with lk.route(model, name):
            alone += answer(model, tokenizer, [prompt], **ask)
    assert not written
    with lk.route(model, names):
        assert answer(model, tokenizer, PROMPTS, batch_size=9, **ask) == alone
    assert len(written) == 3


def test_the_ends_of_a_row_are_those_of_its_adapters(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    end_at(model, "one", 7)
    end_at(model, "two", 8)
    assert isinstance(tokenizer.eos_token_id, int)
    own, base = {tokenizer.eos_token_id}, model.generation_config
    assert base is not None
    own |= {base.eos_token_id} if isinstance(base.eos_token_id, int) else set()
    with lk.route(model, ["one", None, {"one": 0.5, "two": 1}]):
        assert ends_of_rows(model, tokenizer, 3) == [own | {7}, own, own | {7, 8}]
        with pytest.raises(RouteError, match="for 3 rows, but there are 2"):
            answer(model, tokenizer, PROMPTS[:2], max_new_tokens=2)
    with lk.route(model, {"two": 1.0}):
        assert ends_of_rows(model, tokenizer, 1) == [own | {8}]
    lk.switch(model, "one")
    assert ends_of_rows(model, tokenizer, 2) == [own | {7}] * 2
    stop = tokenizer.decode([9])
    assert ends_of_rows(model, tokenizer, 1, stop=stop) == [own | {7, 9}]
    with pytest.raises(ConfigError, match="is 2 tokens of this tokenizer, and must be one"):
        ends_of_rows(model, tokenizer, 1, stop=stop + stop)


def test_a_row_has_the_room_that_its_own_virtual_tokens_leave(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [[5] * 40, [5] * 40]
    with lk.route(model, ["prefix", "one"]):
        assert fitted(model, tokenizer, prompts, max_new_tokens=20).rooms == [2, 8]
        assert len(answer(model, tokenizer, prompts, max_new_tokens=20, note=lambda _: None)) == 2


def test_options_of_the_base_do_not_change_answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def asked(sampling: RandomSampling | None) -> list[str]:
        torch.manual_seed(0)
        return answer(model, tokenizer, PROMPTS, max_new_tokens=12, search=sampling)

    plain, drawn = asked(None), asked(RandomSampling(temperature=2.0))
    base: Any = model.generation_config
    base.repetition_penalty, base.no_repeat_ngram_size, base.top_k = 5.0, 1, 1
    caplog.clear()
    assert asked(None) == plain
    assert asked(RandomSampling(temperature=2.0)) == drawn
    assert not caplog.records
