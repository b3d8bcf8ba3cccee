"""Rows of unlike lengths: each reads its own columns, and rows move to the lowest slots."""

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations import sdpa_attention

from lorakit.serving import kv_slots
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.row_windows import ColumnGroup, groups_of
from lorakit.serving.worker import Limits
from serving.engines import asked, banked, engine_of, greedy_alone, word_tokenizer
from tiny_models import build

UNLIKE = [[5, 9], [4], [3, 8, 4, 7, 6, 9, 11, 2, 30, 5, 17, 12], [8, 5, 6]]


@pytest.fixture
def short_windows(monkeypatch):
    """Groups of a few tokens, as a tiny model's are."""
    monkeypatch.setattr(kv_slots, "LEAST_WINDOW", 4)


def stepped(model, rows, groups=None):
    """The logits of a step of some rows, and those of each row alone."""
    decoder, slots = Decoder(model), KeyValueSlots(len(rows))
    decoder.prove()
    for slot, ids in enumerate(rows):
        cache = DynamicCache()
        decoder.read(ids[:-1] or ids, cache)
        slots.admit(slot, cache)
    texts = [ids if len(ids) > 1 else ids * 2 for ids in rows]
    found = decoder.step([ids[-1] for ids in rows], slots, groups=groups)
    alone = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in texts]
    return found, torch.stack(alone)


def test_groups_are_rows_that_follow_each_other_and_need_as_much():
    assert groups_of([20, 30, 1000, 90]) == [
        ColumnGroup(0, 2, 128),
        ColumnGroup(2, 3, 1001),
        ColumnGroup(3, 4, 128),
    ]
    assert groups_of([0, 700, 800, 900]) == []
    assert groups_of([20, 30]) == []


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", pytest.param("mistral", marks=pytest.mark.thorough)]
)
@torch.no_grad()
def test_a_step_by_groups_has_the_logits_of_each_row_alone(family, short_windows, monkeypatch):
    seen = []
    whole = sdpa_attention.sdpa_attention_forward

    def watched(module, query, key, *args, **kwargs):
        seen.append((query.shape[0], key.shape[2]))
        return whole(module, query, key, *args, **kwargs)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", watched)
    groups = [ColumnGroup(0, 2, 4), ColumnGroup(2, 3, 12), ColumnGroup(3, 4, 4)]
    found, alone = stepped(build(family), UNLIKE, groups)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    assert {(2, 4), (1, 12), (1, 4)} <= set(seen)


@torch.no_grad()
def test_a_model_that_has_its_own_attention_reads_all_columns(short_windows):
    model = build("bloom")
    found, alone = stepped(model, UNLIKE)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_differs_by_groups_keeps_its_attention(monkeypatch):
    model = build("llama")
    before = model.config._attn_implementation
    whole = sdpa_attention.sdpa_attention_forward

    def wrong(module, query, key, value, mask, **kwargs):
        part, weights = whole(module, query, key, value, mask, **kwargs)
        return part * (1 if key.shape[2] > 2 else 2), weights

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", wrong)
    decoder = Decoder(model)
    decoder.prove()
    assert model.config._attn_implementation == before == "sdpa"


def test_the_last_answers_move_to_the_lowest_slots(tiny_llama):
    bank, tokenizer = banked(), word_tokenizer(tiny_llama)
    engine = Engine(bank.model, Limits(slots=4))
    rows = []
    bank.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    # The longest one, with an adapter that has operations of its own, is in the last slot.
    choices = ["small", None, "wide", "dora"]
    waiting = [
        asked(bank, tokenizer, choice, prompt, max_tokens=12 if choice == "dora" else 3)
        for choice, prompt in zip(choices, UNLIKE, strict=True)
    ]
    engine.submit([each.request for each in waiting])
    engine.start()
    for each in waiting:
        assert each.wait().finish == "length"
    engine.close()
    assert (4, 1) in rows
    assert rows[-8:] == [(1, 1)] * 8
    for each, choice in zip(waiting, choices, strict=True):
        alone = greedy_alone(bank, choice, each.request.prompt, each.request.max_tokens)
        assert each.ids == alone


def test_unlike_lengths_are_answered_as_alone(tiny_llama, short_windows):
    bank, tokenizer = banked(), word_tokenizer(tiny_llama)
    engine = engine_of(bank)
    choices = ["small", "dora", None, "wide"]
    waiting = [
        asked(bank, tokenizer, choice, prompt, max_tokens=10)
        for choice, prompt in zip(choices, UNLIKE, strict=True)
    ]
    engine.submit([each.request for each in waiting])
    for each, choice in zip(waiting, choices, strict=True):
        assert each.wait().finish == "length"
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 10)
    engine.close()
