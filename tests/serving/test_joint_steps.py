"""A step of the answers reads parts of prompts in the same forward pass, as if apart."""

import pytest
import torch
from transformers import DynamicCache
from transformers.integrations import sdpa_attention

from covering import sampled
from lorakit.serving import kv_slots
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.joint_pass import PromptPiece
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.pace import CHUNK, Pace
from lorakit.serving.worker import Limits
from serving.engines import asked, banked, greedy_alone, use_of, word_tokenizer
from tiny_models import build

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
ANSWERS = [[5, 9], [4, 4], [3, 8, 4, 7, 6, 9, 11, 2, 30, 5, 17, 12]]
PROMPTS = [[9, 8, 7, 6, 5], [3, 8, 4, 7, 6, 11], [12, 13]]
BEGUN = [0, 4, 1]
"""The tokens of the prompts that were read before."""


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


@pytest.fixture
def short_windows(monkeypatch):
    """Groups of a few tokens, as a tiny model's are."""
    monkeypatch.setattr(kv_slots, "LEAST_WINDOW", 4)


def begun(decoder):
    """Answers in slots, without their last tokens, and the pieces that prompts lack."""
    slots = KeyValueSlots(len(ANSWERS))
    for slot, ids in enumerate(ANSWERS):
        cache = DynamicCache()
        decoder.read(ids[:-1], cache)
        slots.admit(slot, cache)
    pieces = []
    for ids, read in zip(PROMPTS, BEGUN, strict=True):
        cache = DynamicCache()
        if read:
            decoder.read(ids[:read], cache)
        pieces.append(PromptPiece(ids[read:], cache))
    return slots, pieces


@sampled("family", ["llama", "gpt2", "opt", "qwen3", "phi3", "gpt_neox"], share=2)
@torch.no_grad()
def test_a_joint_pass_has_the_logits_and_states_of_each_alone(family, short_windows):
    model = build(family).double()
    decoder = Decoder(model)
    decoder.prove()
    assert decoder.joins
    slots, pieces = begun(decoder)
    step, read = decoder.join([ids[-1] for ids in ANSWERS], slots, pieces)
    slots.end()
    alone = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in [*ANSWERS, *PROMPTS]]
    torch.testing.assert_close(torch.cat([step, read]), torch.stack(alone))
    for ids, piece in zip(PROMPTS, pieces, strict=True):
        whole = DynamicCache()
        decoder.read(ids, whole)
        for mine, other in zip(piece.cache.layers, whole.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys)
    # What the pass wrote is what the next step reads.
    after = decoder.step([7] * len(ANSWERS), slots)
    alone = [model(input_ids=torch.tensor([[*ids, 7]])).logits[0, -1] for ids in ANSWERS]
    torch.testing.assert_close(after, torch.stack(alone))


@torch.no_grad()
def test_each_part_has_the_adapters_of_its_slot():
    bank = banked()
    model, decoder = bank.model, Decoder(bank.model)
    decoder.prove()
    slots = HeldSlots(model, 6)
    choices = ["small", "wide", None, {"small": 0.6, "wide": -0.5}, "wide", "small"]
    order = [0, 1, 2, 5, 3, 4]
    for slot, choice in zip(order, choices, strict=True):
        slots.hold(slot, use_of(bank, choice))
    texts = [*ANSWERS, *PROMPTS]
    states = KeyValueSlots(len(ANSWERS))
    for slot, ids in enumerate(ANSWERS):
        cache = DynamicCache()
        with slots.used(slot, slot + 1):
            decoder.read(ids[:-1], cache)
        states.admit(slot, cache)
    pieces = [PromptPiece(ids, DynamicCache()) for ids in PROMPTS]
    parts = [
        (range(3), 1),
        *(((slot,), len(ids)) for slot, ids in zip((5, 3, 4), PROMPTS, strict=True)),
    ]
    with slots.used_in_parts(parts):
        found = torch.cat(decoder.join([ids[-1] for ids in ANSWERS], states, pieces))
    for row, ids, choice in zip(found, texts, choices, strict=True):
        with bank.route(choice):
            alone = model(input_ids=torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(row, alone, **CLOSE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_gpu_has_joint_passes(dtype):
    decoder = Decoder(build("llama").to("cuda", getattr(torch, dtype)))
    decoder.prove()
    assert decoder.joins
    # Whether the bits are those of each row alone is the library's to say.
    decoder.make_invariant()
    slots, pieces = begun(decoder)
    found = torch.cat(decoder.join([ids[-1] for ids in ANSWERS], slots, pieces)).float().cpu()
    model = build("llama")
    alone = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in [*ANSWERS, *PROMPTS]]
    close = CLOSE if dtype == "float32" else {"atol": 0.02, "rtol": 0.05}
    torch.testing.assert_close(found, torch.stack(alone), **close)


def passes(model):
    """The shapes of what a model is given from now on."""
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def answered(bank, tokenizer, choices, engine, *, first="wide", **how):
    """What a model is given while some requests come beside an answer that goes on."""
    running = asked(bank, tokenizer, first, [5, 6, 7], max_tokens=40)
    engine.submit([running.request])
    engine.start()
    running.next()
    shapes = passes(bank.model)
    given = [
        asked(bank, tokenizer, choice, [3 + at, *range(8, 15 + at)], max_tokens=4, **how)
        for at, choice in enumerate(choices)
    ]
    engine.submit([each.request for each in given])
    for each in (*given, running):
        each.wait()
    engine.close()
    shapes = list(shapes)
    for each, choice in zip((*given, running), (*choices, first), strict=True):
        request = each.request
        assert each.ids == greedy_alone(bank, choice, request.prompt, request.max_tokens), choice
    return shapes


def test_prompts_that_come_beside_an_answer_are_read_in_its_steps(tokenizer):
    bank = banked()
    engine = Engine(bank.model, Limits(slots=5))
    choices = ["small", None, "wide", {"small": 0.6, "wide": -0.5}]
    shapes = answered(bank, tokenizer, choices, engine)
    # One row has the answer's token and those of a prompt, of 8 to 12.
    assert any(rows == 1 and tokens > 8 for rows, tokens in shapes)
    assert engine.step_counts["with prompts"] == engine.joint.count > 0


def test_a_long_prompt_is_read_in_parts_by_several_steps(tokenizer, monkeypatch):
    bank = banked()
    engine = Engine(bank.model, Limits(slots=5))
    monkeypatch.setattr(engine.pace, "share", lambda most, **step: 3)
    shapes = answered(bank, tokenizer, ["small", "wide"], engine)
    joint = [tokens for rows, tokens in shapes if rows == 1 and tokens > 1]
    # A token of the answer, and at most three of each prompt.
    assert len(joint) >= 3
    assert max(joint) == 7


@pytest.mark.thorough
def test_what_has_operations_of_its_own_is_read_apart(tokenizer):
    bank = banked()
    engine = Engine(bank.model, Limits(slots=5))
    answered(bank, tokenizer, ["dora", "dora"], engine)
    assert not engine.joint.count
    bank = banked()
    engine = Engine(bank.model, Limits(slots=5))
    answered(bank, tokenizer, ["small"], engine, first="dora")
    assert not engine.joint.count


def test_a_prompt_whose_probabilities_are_asked_for_is_read_apart(tokenizer):
    bank = banked()
    engine = Engine(bank.model, Limits(slots=5))
    answered(bank, tokenizer, ["small", "wide"], engine, prompt_logprobs=0)
    assert not engine.joint.count


def test_a_joint_pass_that_fails_is_done_apart_and_there_is_no_other(tokenizer, monkeypatch):
    bank = banked()
    notes: list[str] = []
    engine = Engine(bank.model, Limits(slots=5), note=notes.append)
    monkeypatch.setattr(engine.pace, "share", lambda most, **step: 4)
    whole, calls = engine.decoder.join, []

    def failing(tokens, slots, pieces):
        calls.append(len(pieces))
        if len(calls) == 1:
            return whole(tokens, slots, pieces)
        # Some layers have read the pieces then.
        whole(tokens, slots, pieces)
        for piece in pieces:
            layer = piece.cache.layers[0]
            layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        raise RuntimeError("no memory\nwas left")

    monkeypatch.setattr(engine.decoder, "join", failing)
    answered(bank, tokenizer, ["small", None, "wide"], engine)
    assert len(calls) == 2
    assert notes == ["prompts are no longer read in the answers' steps: RuntimeError: no memory"]


@pytest.mark.parametrize("family", ["bloom", "mistral"])
@torch.no_grad()
def test_attention_of_another_kind_has_no_joint_passes(family):
    """ALiBi is no attention by name, and windows of tokens need masks of their own."""
    more = {"sliding_window": 4} if family == "mistral" else {}
    decoder = Decoder(build(family, **more))
    decoder.prove()
    assert not decoder.joins


@torch.no_grad()
def test_a_model_that_differs_in_a_joint_pass_has_none(monkeypatch):
    whole = sdpa_attention.sdpa_attention_forward

    def wrong(module, query, key, value, mask, **kwargs):
        part, weights = whole(module, query, key, value, mask, **kwargs)
        # As many tokens as only the second part of a prompt has.
        return part * (2 if query.shape[2] == 3 else 1), weights

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", wrong)
    decoder = Decoder(build("llama"))
    decoder.prove()
    assert not decoder.joins


def test_the_share_of_a_joint_pass_is_what_the_step_leaves():
    pace = Pace()
    for tokens in (256, 64, 32, 128):
        pace.stepped(12, 0.21)
        pace.read(tokens, 0.18 + 0.0025 * tokens)
    # 2.75 steps are 0.58 s, in which a pass has 159 tokens.
    assert pace.share(256, joined=12) == 144
    assert pace.share(256) == 72
    slow = Pace()
    slow.stepped(16, 0.01)
    slow.read(16, 1.0)
    assert slow.share(256, joined=16) == CHUNK
