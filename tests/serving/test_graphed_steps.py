"""Decode steps that are recorded and played: proven first, eager where they can't be recorded."""

import pytest
import torch

from lorakit.errors import ModelError
from lorakit.serving.decoder import Decoder
from lorakit.serving.engine import Engine
from lorakit.serving.graphed_steps import GraphedSteps
from lorakit.serving.held_slots import HeldSlots
from lorakit.serving.kv_slots import KeyValueSlots
from lorakit.serving.steps import OTHERS
from lorakit.serving.worker import Limits
from serving.engines import asked, banked, greedy_alone, word_tokenizer
from tiny_models import build

PROMPTS = [[5, 9, 4], [7], [3, 8, 4, 7, 6, 11, 12], [20, 21]]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return word_tokenizer(tiny_llama)


def at_once(compute):
    """In the place of a CUDA graph: the computation itself."""
    return compute


def graphed(bank, record=at_once):
    """An engine whose steps are recorded, its steps, and what it notes."""
    notes: list[str] = []
    engine = Engine(bank.model, Limits(slots=4))
    engine.steps = GraphedSteps(
        engine.decoder, engine.slots, engine.keys_and_values, note=notes.append, record=record
    )
    return engine, engine.steps, notes


def check_answers(engine, bank, tokenizer, choices, max_tokens=8):
    """Ask each choice with a prompt of its own, and compare with what answers alone."""
    given = [
        asked(bank, tokenizer, choice, prompt, max_tokens=max_tokens)
        for choice, prompt in zip(choices, PROMPTS, strict=False)
    ]
    engine.submit([each.request for each in given])
    engine.start()
    for each, choice in zip(given, choices, strict=True):
        assert each.wait().finish == "length"
        assert each.ids == greedy_alone(bank, choice, each.request.prompt, max_tokens)
    engine.close()


def test_answers_of_played_steps_are_those_of_each_alone(tokenizer):
    bank, recorded = banked(), []

    def record(compute):
        recorded.append(compute)
        return compute

    engine, steps, notes = graphed(bank, record)
    check_answers(engine, bank, tokenizer, ["small", None, "wide", {"small": 0.6, "wide": -0.5}])
    assert (steps.counts["recorded"], len(recorded), notes) == (6, 1, [])


def test_rows_with_operations_of_their_own_are_eager(tokenizer):
    bank = banked()
    engine, steps, _ = graphed(bank)
    check_answers(engine, bank, tokenizer, ["small", "dora"])
    assert steps.counts == {OTHERS: 7}


def test_what_cannot_be_recorded_is_eager(tokenizer):
    def failing(compute):
        raise RuntimeError("a graph can't hold this")

    bank = banked()
    engine, steps, notes = graphed(bank, failing)
    check_answers(engine, bank, tokenizer, ["small", "wide"])
    assert steps.counts == {"RuntimeError: a graph can't hold this": 7}
    assert len(notes) == 1
    assert "2 rows" in notes[0]


def test_a_recorded_step_with_other_logits_is_not_used(tokenizer):
    bank = banked()
    engine, steps, notes = graphed(bank, lambda compute: lambda: 2 * compute())
    check_answers(engine, bank, tokenizer, ["small", "wide"])
    assert "a logit is" in notes[0]
    assert not steps.counts["recorded"]


def test_a_model_whose_layers_see_windows_is_refused():
    model = build("mistral", sliding_window=4)
    with pytest.raises(ModelError, match="windows"):
        GraphedSteps(Decoder(model), HeldSlots(model, 2), KeyValueSlots(2), note=print)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_steps_are_recorded_on_a_gpu(tokenizer):
    bank = banked()
    bank.model.to("cuda")
    notes: list[str] = []
    engine = Engine(bank.model, Limits(slots=4, compile="auto"), note=notes.append)
    choices = ["small", None, "wide"]
    given = [
        asked(bank, tokenizer, choice, prompt, max_tokens=12)
        for choice, prompt in zip(choices, PROMPTS, strict=False)
    ]
    engine.submit([each.request for each in given])
    engine.start()
    for each in given:
        assert each.wait().finish == "length"
    engine.close()
    assert notes == []
    assert engine.step_counts["recorded"] > 0
    plain = banked()
    for each, choice in zip(given, choices, strict=True):
        assert each.ids == greedy_alone(plain, choice, each.request.prompt, 12)
