"""Compiled decode steps: used once they are proven, eager before and beside, with equal answers."""

import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lorakit.bank import AdapterBank
from lorakit.config.serve import ServeConfig
from lorakit.kernels import few_rows
from lorakit.serving.compiled_blocks import blocks_of
from lorakit.serving.compiled_steps import CompiledSteps
from lorakit.serving.compiler_process import compiled_apart
from lorakit.serving.engine import Engine
from lorakit.serving.kv_slots import KeyValueSlots, window_for
from lorakit.serving.serve import prepared
from lorakit.serving.steps import Steps
from lorakit.serving.worker import Limits
from serving.engines import adapters, asked, banked, greedy_alone, word_tokenizer
from tiny_models import build

PROMPTS = [[5, 9, 4], [7], [3, 8, 4, 7, 6, 11, 12], [20, 21]]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


def as_traced(graph, inputs, stop=None):
    """In the compiler's place: the graph itself."""
    return graph


def compiling(bank, compile_one=as_traced, **limits):
    """An engine whose steps go through graphs, what it notes, and its steps."""
    notes: list[str] = []
    engine = Engine(bank.model, Limits(**({"slots": 4, "compile": "auto"} | limits)))
    engine.steps = CompiledSteps(
        engine.decoder,
        engine.slots,
        engine.keys_and_values,
        note=notes.append,
        compile_one=compile_one,
        stop=threading.Event(),
    )
    return engine, notes, engine.steps


def answer(engine, bank, tokenizer, choices, max_tokens=8):
    """Have each choice asked with a prompt of its own, and compare with what answers alone."""
    given = [
        asked(bank, tokenizer, choice, prompt, max_tokens=max_tokens)
        for choice, prompt in zip(choices, PROMPTS, strict=False)
    ]
    engine.submit([each.request for each in given])
    for each, choice in zip(given, choices, strict=True):
        each.wait()
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, max_tokens), choice


def settled(steps):
    """Wait until the compiler has nothing to do."""
    while steps._building is not None and steps._building[1].is_alive():
        time.sleep(0.01)


@pytest.fixture
def started():
    """Starts engines, and ends them."""
    engines = []

    def start(engine):
        engines.append(engine)
        engine.start()
        return engine

    yield start
    for engine in engines:
        assert engine.close(drain=False, timeout_s=60.0)


def test_answers_are_the_same_before_and_after_the_swap(tokenizer, started):
    bank, codes = banked(), []
    engine, notes, steps = compiling(bank, lambda g, i: codes.append(g) or g)
    started(engine)
    choices = ["small", None, "wide", {"small": 0.6, "wide": -0.5}]
    answer(engine, bank, tokenizer, choices)
    settled(steps)
    before = steps.counts["compiled"]
    answer(engine, bank, tokenizer, choices)
    answer(engine, bank, tokenizer, ["wide", "small", None, "small"])
    assert steps.counts["compiled"] >= before + 12
    assert not notes
    assert len(codes) == 1, "equal blocks share their code"


@pytest.mark.thorough
def test_eager_steps_go_on_while_the_compiler_works(tokenizer, started):
    bank, gate = banked(), threading.Event()
    engine, _, steps = compiling(bank, lambda graph, inputs: gate.wait(60) and graph)
    started(engine)
    answer(engine, bank, tokenizer, ["small", "wide"])
    assert steps.counts["compiling"]
    assert not steps.counts["compiled"]
    gate.set()
    settled(steps)
    answer(engine, bank, tokenizer, ["wide", "small"])
    assert steps.counts["compiled"]


def failing(graph, inputs):
    raise RuntimeError("no compiler here\nat all")


def wrong(graph, inputs):
    return lambda *inputs: [each * 1.5 for each in graph(*inputs)]


@pytest.mark.parametrize(
    ("compile_one", "reason"),
    [
        pytest.param(failing, "no compiler here", marks=pytest.mark.thorough),
        (wrong, "a logit is"),
    ],
)
def test_what_cannot_be_compiled_is_eager_and_noted_once(compile_one, reason, tokenizer, started):
    bank = banked()
    engine, notes, steps = compiling(bank, compile_one)
    started(engine)
    for _ in range(2):
        answer(engine, bank, tokenizer, ["small", "wide"])
        settled(steps)
    assert not steps.counts["compiled"]
    assert [reason in note for note in notes] == [True], notes
    assert any(reason in how for how in steps.counts)


@pytest.mark.thorough
def test_a_row_that_needs_groups_makes_its_steps_eager(tokenizer, started):
    bank = banked()
    engine, _, steps = compiling(bank)
    started(engine)
    answer(engine, bank, tokenizer, ["small", "dora"])
    assert set(steps.counts) == {
        "an adapter that is no sum of B·A·x, or of a rank beyond slot_rank"
    }
    for _ in range(3):
        answer(engine, bank, tokenizer, ["small", "wide"])
        settled(steps)
    assert steps.counts["compiled"]


@pytest.mark.thorough
def test_wider_ranks_and_longer_rows_get_code_of_their_own(monkeypatch, tokenizer, started):
    monkeypatch.setattr("lorakit.serving.kv_slots.LEAST_WINDOW", 8)
    bank = banked()
    engine, notes, steps = compiling(bank)
    started(engine)

    def windows(*choices):
        for _ in range(4):
            answer(engine, bank, tokenizer, choices)
            settled(steps)
        return {shapes.window for shapes in steps._code}

    assert windows("small", "small") == {8, 16}
    narrow = list(steps._code)
    assert windows("wide", "small") == {8, 16}
    assert not set(narrow) & set(steps._code), "what reads buffers that are gone"
    assert not notes


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "gemma2", "mistral", "gpt_neox"])
def test_every_decoder_is_compiled_as_it_computes(family, tokenizer, started):
    more = {"sliding_window": 4} if family in ("gemma2", "mistral") else {}
    bank = AdapterBank(build(family, **more))
    for name in ("small", "wide"):
        bank.add(name, adapters(family)[name])
    engine, notes, steps = compiling(bank, slots=2)
    started(engine)
    for _ in range(3):
        answer(engine, bank, tokenizer, ["small", "wide"])
        settled(steps)
    assert steps.counts["compiled"], (notes, steps.counts)
    assert not notes


@pytest.mark.thorough
def test_compiled_code_answers_as_eager_steps_do(tokenizer, started):
    bank = banked()
    engine, notes, steps = compiling(bank, partial(compiled_apart, stop=threading.Event()))
    started(engine)
    choices = ["small", None, "wide", {"small": 0.6, "wide": -0.5}]
    answer(engine, bank, tokenizer, choices)
    # Other rows are computed while the compiler works.
    answer(engine, bank, tokenizer, choices)
    settled(steps)
    answer(engine, bank, tokenizer, choices)
    assert steps.counts["compiled"], notes
    assert not notes


def test_compiled_code_computes_few_rows_as_eager_steps_do(monkeypatch, tokenizer, started):
    monkeypatch.setattr(few_rows, "LEAST_VALUES", 1)
    monkeypatch.setattr(few_rows, "_known", {})
    times = {"own": 1.0, "turned": 0.5, "onednn": 0.6}
    monkeypatch.setattr(few_rows, "_timed", lambda *_: times)
    bank, codes = banked(), []
    engine, notes, steps = compiling(bank, lambda g, i: codes.append(g) or g)
    started(engine)
    choices = ["small", None, "wide"]
    for _ in range(2):
        answer(engine, bank, tokenizer, choices)
        settled(steps)
    assert steps.counts["compiled"], notes
    assert not notes
    assert codes
    assert all(is_turned(code) for code in codes)


def is_turned(code):
    """Whether a graph multiplies weights by inputs, and not inputs by weights."""
    first = [node.args[0] for node in code.graph.nodes if node.target is torch.ops.aten.mm.default]
    return bool(first) and all(node.name.startswith("constant") for node in first)


@pytest.mark.thorough
def test_waiting_has_code_for_any_number_of_rows_at_the_start(monkeypatch, tokenizer, started):
    monkeypatch.setattr("lorakit.serving.step_kinds.compiled_apart", as_traced)
    bank = banked()
    engine = Engine(bank.model, Limits(slots=3, compile="wait"), note=pytest.fail)
    engine.warm_up([[(bank.hold(name).updates, 1.0)] for name in ("small", "wide")])
    started(engine)
    counts = engine.step_counts.copy()
    for choices in (["small"], ["wide", None], ["wide", "small", None]):
        answer(engine, bank, tokenizer, choices)
    new = engine.step_counts - counts
    assert set(new) == {"compiled"}


@pytest.mark.thorough
def test_a_server_compiles_as_its_settings_say(monkeypatch, words, folder):
    monkeypatch.setattr("lorakit.serving.step_kinds.compiled_apart", as_traced)
    how: dict[str, Any] = {"adapters": folder, "model": str(words), "slots": 2}
    engine, catalog = prepared(ServeConfig(**how, compile="wait"), note=pytest.fail)
    assert isinstance(engine, Engine)
    assert isinstance(engine.steps, CompiledSteps)
    assert {shapes.rows for shapes in engine.steps._code} == {1, 2}
    layout = engine.slots.layout
    for name in catalog.adapters:
        engine.slots.reserve([(catalog.held(name).updates, 1.0)])
    assert engine.slots.layout == layout, "the adapters of the start have room"
    plain, _ = prepared(ServeConfig(**how, compile="off"), note=pytest.fail)
    assert isinstance(plain, Engine)
    assert type(plain.steps) is Steps


def test_windows_have_few_sizes_and_room_for_one_token_more():
    assert [window_for(n) for n in (1, 127, 128, 255, 256)] == [128, 128, 256, 256, 512]


def test_rows_are_moved_to_where_a_window_ends():
    slots = KeyValueSlots(2, windows=True)
    generator = torch.Generator().manual_seed(0)

    def read(tokens):
        cache = DynamicCache()
        cache.update(*torch.randn(2, 1, 1, tokens, 4, generator=generator), 0)
        return cache

    first, second = read(5), read(150)
    slots.admit(0, first)
    slots.begin(2, 128)
    slots.admit(1, second)
    _, mask, positions = slots.begin(2, 256)
    assert mask.sum(1).tolist() == [6, 151]
    assert mask.shape == (2, 256)
    assert positions == [5, 150]
    for slot, cache in ((0, first), (1, second)):
        keys, values = slots.copied(slot)[0]
        assert torch.equal(keys, cache.layers[0].keys)
        assert torch.equal(values, cache.layers[0].values)


def test_blocks_are_found_once():
    assert list(blocks_of(build("llama"))) == ["model.layers.0", "model.layers.1"]
