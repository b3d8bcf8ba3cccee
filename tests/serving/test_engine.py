"""The engine: every request is answered as if alone, whoever comes and goes meanwhile."""

import random
import threading
import time

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.bank import AdapterBank
from lorakit.errors import BankError, ModelError
from lorakit.serving.admission import ClosedError, QueueFullError
from lorakit.serving.engine import Engine
from lorakit.serving.worker import Limits
from references import attach_random
from serving.engines import (
    adapters,
    asked,
    banked,
    engine_of,
    greedy_alone,
    use_of,
    word_tokenizer,
)
from tiny_models import build

CHOICES = [None, "small", "wide", "dora", {"small": 0.6, "wide": -0.5}]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def served():
    bank = banked()
    engine = engine_of(bank)
    yield bank, engine
    engine.close(drain=False)


@pytest.fixture
def bank(served):
    return served[0]


@pytest.fixture
def engine(served):
    return served[1]


def prompts(count, seed=0, longest=12):
    draw = random.Random(seed)
    return [
        [draw.randrange(3, 60) for _ in range(draw.randrange(1, longest))] for _ in range(count)
    ]


def paused(bank, engine):
    """A lock by which a test holds the engine before its next call of the model."""
    gate = threading.Lock()
    hook = bank.model.register_forward_pre_hook(lambda *_: gate.acquire() and gate.release())
    return gate, hook


def test_mixed_requests_are_answered_as_generate_answers_each(bank, engine, tokenizer):
    asked_for = [
        asked(bank, tokenizer, CHOICES[at % len(CHOICES)], prompt, max_tokens=3 + at % 5)
        for at, prompt in enumerate(prompts(13))
    ]
    choices = [CHOICES[at % len(CHOICES)] for at in range(13)]
    engine.submit([each.request for each in asked_for])
    for each in asked_for:
        assert each.wait().finish == "length"
    for each, choice in zip(asked_for, choices, strict=True):
        request = each.request
        alone = greedy_alone(bank, choice, request.prompt, request.max_tokens)
        assert each.ids == alone, choice


@sampled("family", ["gpt2", "bloom", "opt", "gemma2", "mistral", "gpt_neox"])
def test_every_decoder_that_can_be_batched_is_served(family, tokenizer):
    more = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    bank = AdapterBank(build(family, **more))
    for name in ("small", "wide"):
        bank.add(name, adapters(family)[name])
    engine = engine_of(bank, slots=3, prefill_tokens=5)
    choices = [None, "small", "wide", {"small": 0.5}]
    given = [asked(bank, tokenizer, c, p) for c, p in zip(choices, prompts(4, 1), strict=True)]
    engine.submit([each.request for each in given])
    for each in given:
        each.wait()
    assert engine.close()
    for each, choice in zip(given, choices, strict=True):
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 8)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_is_no_decoder_is_refused(family):
    with pytest.raises(ModelError, match="can't be served"):
        Engine(build(family))


def test_a_model_whose_steps_differ_from_its_own_forward_pass_is_refused(monkeypatch):
    model = build("llama")
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ModelError, match="does not compute what it computes alone"):
        Engine(model)


def test_rows_join_and_leave_in_mid_flight(bank, engine, tokenizer):
    long = asked(bank, tokenizer, "wide", [5, 6, 7], max_tokens=24)
    engine.submit([long.request])
    long.next()
    others = []
    for at, prompt in enumerate(prompts(8, seed=2, longest=20)):
        other = asked(bank, tokenizer, CHOICES[at % 4], prompt, max_tokens=2)
        engine.submit([other.request])
        others.append(other)
        other.wait()
    long.wait()
    assert long.ids == greedy_alone(bank, "wide", [5, 6, 7], 24)
    for at, other in enumerate(others):
        assert other.ids == greedy_alone(bank, CHOICES[at % 4], other.request.prompt, 2)


def test_a_rank_beyond_that_of_the_slots_answers_beside_others(bank, tokenizer):
    engine = engine_of(bank, slot_rank=3)
    choices = ["wide", "small", None, {"small": 0.6, "wide": -0.5}, "wide"]
    given = [asked(bank, tokenizer, c, p) for c, p in zip(choices, prompts(5, 4), strict=True)]
    engine.submit([each.request for each in given])
    for each in given:
        assert each.wait().finish == "length"
    assert engine.close()
    for each, choice in zip(given, choices, strict=True):
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, 8)
    assert {r for own in engine.slots._inputs.values() for r in own.ranks.values()} == {2}


def test_a_seed_draws_the_same_alone_and_among_others(bank, engine, tokenizer):
    sampling = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
    alone = asked(bank, tokenizer, "small", [8, 9], sampling=sampling)
    engine.submit([alone.request])
    alone.wait()
    crowd = [
        asked(bank, tokenizer, c, p, sampling={"temperature": 1.3, "seed": at})
        for at, (c, p) in enumerate(zip(CHOICES, prompts(5, 3), strict=True))
    ]
    again = asked(bank, tokenizer, "small", [8, 9], sampling=sampling)
    engine.submit([each.request for each in (*crowd, again)])
    again.wait()
    assert again.ids == alone.ids
    other = asked(bank, tokenizer, "small", [8, 9], sampling=sampling | {"seed": 8})
    engine.submit([other.request])
    other.wait()
    assert other.ids != alone.ids


def test_a_request_ends_on_the_weights_it_began_with(tokenizer):
    bank, made = banked(), adapters()
    old = greedy_alone(bank, "wide", [5, 6, 7], 20)
    engine = engine_of(bank)
    gate, hook = paused(bank, engine)
    with gate:
        first = asked(bank, tokenizer, "wide", [5, 6, 7], max_tokens=20)
        waiting = asked(bank, tokenizer, "wide", [5, 6, 7], max_tokens=20)
        engine.submit([first.request, waiting.request])
        other = build("llama")
        attach_random(other, seed=99, std=0.3, rank=4, targets=("all-linear",))
        bank.add("wide", lk.extract(other, "default"))
    after = asked(bank, tokenizer, "wide", [5, 6, 7], max_tokens=20)
    engine.submit([after.request])
    for each in (first, waiting, after):
        each.wait()
    hook.remove()
    assert first.ids == waiting.ids == old
    assert after.ids == greedy_alone(bank, "wide", [5, 6, 7], 20) != old
    prints = [each.request.use.fingerprint("base") for each in (first, waiting, after)]
    assert prints[0] == prints[1] != prints[2]
    gate.acquire()
    last = asked(bank, tokenizer, "small", [5, 6, 7], max_tokens=5)
    expected = made["small"]
    engine.submit([last.request])
    bank.unload("small")
    with pytest.raises(BankError, match="no adapter 'small'"):
        use_of(bank, "small")
    gate.release()
    last.wait()
    assert engine.close()
    bank.add("again", expected)
    assert last.ids == greedy_alone(bank, "again", [5, 6, 7], 5)


def test_a_cancelled_request_frees_its_slot_within_two_steps(bank, tokenizer):
    engine = engine_of(bank, slots=1)
    given = [asked(bank, tokenizer, "small", [4, 5], max_tokens=25) for _ in range(3)]
    engine.submit([each.request for each in given])
    given[0].next()
    given[0].request.cancel()
    given[1].request.cancel()
    steps = len(given[0].deltas)
    assert given[0].wait().finish == "cancelled"
    assert len(given[0].deltas) - steps <= 25
    assert given[1].wait().finish == "cancelled"
    assert given[1].ids == []
    assert given[2].wait().finish == "length"
    assert engine.close()
    assert engine.running() == []


def test_an_error_of_the_model_fails_its_batch_and_not_the_engine(tokenizer):
    bank = banked()
    engine = engine_of(bank)

    def fail(module, args, kwargs):
        if 63 in kwargs["input_ids"]:
            raise RuntimeError("out of memory")

    broken = asked(bank, tokenizer, "small", [63], max_tokens=4)
    fine = asked(bank, tokenizer, "small", [5, 6], max_tokens=4)
    hook = bank.model.register_forward_pre_hook(fail, with_kwargs=True)
    engine.submit([broken.request, fine.request])
    assert broken.wait().finish == "error"
    assert "out of memory" in str(broken.deltas[-1].error)
    fine.wait()
    hook.remove()
    again = asked(bank, tokenizer, "small", [63], max_tokens=4)
    engine.submit([again.request])
    assert again.wait().finish == "length"
    assert again.ids == greedy_alone(bank, "small", [63], 4)
    assert engine.close()


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_an_adapter_whose_numbers_overflow_leaves_nothing_to_others(size, tokenizer):
    bank = banked()
    diverged = adapters()["wide"]
    for tensor in diverged.tensors.values():
        tensor.fill_(size)
    bank.add("diverged", diverged)
    engine = engine_of(bank, slots=2)
    # Beside a longer row the columns before a short one are hidden, and not left out.
    long = asked(bank, tokenizer, "small", list(range(4, 20)), max_tokens=12)
    engine.submit([long.request])
    long.next()
    others = []
    for choice in (None, "small", "diverged", "wide"):
        broken = asked(bank, tokenizer, "diverged", [5, 6, 7])
        engine.submit([broken.request])
        assert broken.wait().finish == "error"
        assert "diverged gave no numbers (NaN)" in str(broken.deltas[-1].error)
        if choice != "diverged":
            fine = asked(bank, tokenizer, choice, [5, 6, 7], max_tokens=2)
            engine.submit([fine.request])
            assert fine.wait().finish == "length", fine.deltas[-1].error
            others.append((choice, fine))
    assert long.wait().finish == "length"
    assert engine.close()
    for choice, fine in others:
        assert fine.ids == greedy_alone(bank, choice, [5, 6, 7], 2)
    assert long.ids == greedy_alone(bank, "small", long.request.prompt, 12)


def test_a_slot_that_was_spoilt_in_an_answer_is_cleared(monkeypatch, tokenizer):
    bank = banked()
    engine = engine_of(bank, slots=2, prefill_tokens=16)
    step = engine.steps.step
    spoil: set[int] = set()

    def overflowing(tokens, used):
        logits = step(tokens, used)
        for slot in spoil:
            # As an overflow in the row's own layers would.
            for layer in engine.keys_and_values._layers:
                layer.values[slot, :, layer.end] = float("nan")
            logits = logits.clone()
            logits[slot] = float("nan")
        spoil.clear()
        return logits

    monkeypatch.setattr(engine.steps, "step", overflowing)
    long = asked(bank, tokenizer, "small", list(range(4, 16)), max_tokens=18)
    short = asked(bank, tokenizer, "wide", [5, 6], max_tokens=12)
    engine.submit([long.request, short.request])
    short.next()
    spoil.add(1)
    assert short.wait().finish == "error"
    after = asked(bank, tokenizer, "wide", [9, 8], max_tokens=3)
    engine.submit([after.request])
    assert after.wait().finish == "length"
    long.wait()
    assert engine.close()
    assert after.ids == greedy_alone(bank, "wide", [9, 8], 3)
    assert long.ids == greedy_alone(bank, "small", long.request.prompt, 18)


def test_the_queue_is_bounded_and_adapters_take_turns(bank, tokenizer):
    engine = Engine(bank.model, Limits(slots=1, waiting_requests=4, waiting_tokens=100))
    given = [asked(bank, tokenizer, c, [4, 5], max_tokens=2) for c in ["small"] * 3 + ["wide"]]
    engine.submit([each.request for each in given])
    with pytest.raises(QueueFullError, match="no more than 4 may"):
        engine.submit([asked(bank, tokenizer, None, [4]).request])
    assert [engine.queue.take().use.names for _ in range(2)] == [("small",), ("wide",)]
    with pytest.raises(QueueFullError, match="no more than 100 may"):
        engine.submit([asked(bank, tokenizer, None, [4] * 99).request])
    engine.start()
    assert given[2].wait().finish == "length"
    assert engine.close()
    with pytest.raises(ClosedError):
        engine.submit([asked(bank, tokenizer, None, [4]).request])


def test_what_ends_an_answer(bank, engine, tokenizer):
    ids = greedy_alone(bank, "wide", [5, 6, 7], 8)
    words = [tokenizer.decode([token]) for token in ids]
    by_end = asked(bank, tokenizer, "wide", [5, 6, 7], ends=frozenset({ids[3]}))
    by_token = asked(bank, tokenizer, "wide", [5, 6, 7], stop_tokens=frozenset({ids[3]}))
    engine.submit([by_end.request, by_token.request])
    where = ids.index(ids[3])
    for each, stopped in ((by_end, None), (by_token, ids[3])):
        last = each.wait()
        assert (last.finish, last.stopped_by) == ("stop", stopped)
        assert each.ids == ids[: where + 1]
        assert each.text == tokenizer.decode(ids[:where], skip_special_tokens=True)
    assert words


def test_log_probabilities_are_those_of_the_model(bank, engine, tokenizer):
    prompt = [5, 6, 7, 8, 9, 10]
    how = {"sampling": {"alternatives": 3}, "prompt_logprobs": 2, "max_tokens": 4}
    given = asked(bank, tokenizer, "small", prompt, **how)
    only = asked(bank, tokenizer, "small", prompt, prompt_logprobs=1, max_tokens=0)
    engine.submit([given.request, only.request])
    given.wait()
    assert only.wait().finish == "length"
    ids = torch.tensor([[*prompt, *given.ids]])
    with bank.route("small"), torch.no_grad():
        logprobs = bank.model(input_ids=ids).logits[0].log_softmax(-1)
    tokens = [token for delta in given.deltas for token in delta.tokens]
    for at, token in enumerate(tokens, len(prompt) - 1):
        assert token.logprob == pytest.approx(float(logprobs[at, token.id]), abs=1e-4)
        best = logprobs[at].topk(3)
        assert [other for other, _ in token.alternatives] == best.indices.tolist()
    own = given.deltas[0].prompt_tokens
    assert own[0] is None
    for at, token in enumerate(own[1:]):
        assert token.id == prompt[at + 1]
        assert token.logprob == pytest.approx(float(logprobs[at, token.id]), abs=1e-4)
    assert [t.id for t in only.deltas[-1].prompt_tokens[1:]] == prompt[1:]


def test_closing_drains_or_ends_at_once(bank, tokenizer):
    for drain, finish in ((True, "length"), (False, "cancelled")):
        engine = engine_of(bank, slots=1)
        given = [asked(bank, tokenizer, None, [4], max_tokens=20) for _ in range(3)]
        engine.submit([each.request for each in given])
        given[0].next()
        assert engine.close(drain=drain, timeout_s=60.0)
        assert given[2].wait().finish == finish


@pytest.mark.thorough
def test_no_answer_is_crossed_while_adapters_come_and_go(tokenizer):
    bank = banked()
    engine = engine_of(bank, slots=6)
    pool = [(choice, prompt) for choice in CHOICES[:4] for prompt in prompts(4, seed=9)]
    expected = {at: greedy_alone(bank, c, p, 6) for at, (c, p) in enumerate(pool)}
    over = threading.Event()

    def shuffle():
        made = adapters()
        while not over.is_set():
            bank.add("extra", made["small"])
            bank.unload("extra")
            time.sleep(0.005)

    loader = threading.Thread(target=shuffle)
    loader.start()
    draw = random.Random(1)
    for _ in range(20):
        picked = [draw.randrange(len(pool)) for _ in range(25)]
        given = [asked(bank, tokenizer, *pool[at], max_tokens=6) for at in picked]
        engine.submit([each.request for each in given])
        for at, each in zip(picked, given, strict=True):
            each.wait()
            assert each.ids == expected[at], pool[at]
    over.set()
    loader.join()
    assert engine.close()
