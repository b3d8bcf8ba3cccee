"""Routes and `generate`: beams, samples, padding, and batches of the wrong length."""

import itertools

import pytest
import torch

import lorakit as lk
from covering import covering
from lorakit.errors import RouteError
from references import alone
from routing.test_route import adapted
from tiny_models import example_inputs

BEAMS = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}


def prompts(model, rows=3):
    """Prompts of several lengths, padded on the left."""
    inputs = example_inputs(model, rows=rows)
    inputs.pop("decoder_input_ids", None)
    if not model.config.is_encoder_decoder:
        for row in range(rows):
            inputs["input_ids"][row, :row] = 0
            inputs["attention_mask"][row, :row] = 0
    return inputs


@covering(
    ("family", "options"),
    itertools.product(["llama", "gpt2", "bloom", "gemma2", "t5"], [{"do_sample": False}, BEAMS]),
)
def test_generation_writes_what_each_row_would_write_alone(family, options):
    model = adapted(family)
    inputs, names = prompts(model), ["two", None, {"one": 0.7, "two": 0.6}]
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with lk.route(model, names):
        together = model.generate(**inputs, **options)
    each = len(together) // 3
    written = []
    for row, name in enumerate(names):
        with lk.route(model, name):
            mine = {k: v[row : row + 1] for k, v in inputs.items()}
            written.append(model.generate(**mine, **options))
        assert torch.equal(together[row * each : (row + 1) * each], written[-1])
    assert len({tuple(w[0, -5:].tolist()) for w in written}) > 1


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_samples_of_a_row_use_its_adapter(family):
    model = adapted(family)
    inputs, names = prompts(model), ["two", None, "one"]
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    options |= {"return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    with lk.route(model, names):
        found = model.generate(**inputs, **options)
    repeated = {k: v.repeat_interleave(2, 0) for k, v in inputs.items()}
    first = alone(model, _with_start(model, repeated), [n for n in names for _ in range(2)])
    torch.testing.assert_close(found.logits[0], torch.stack(first)[:, -1], rtol=1e-4, atol=1e-4)


def _with_start(model, inputs):
    if not model.config.is_encoder_decoder:
        mask = inputs["attention_mask"]
        return inputs | {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    return inputs | {"decoder_input_ids": torch.zeros(len(inputs["input_ids"]), 1).long()}


def test_beams_without_a_cache_are_refused_and_greedy_is_right():
    model = adapted()
    inputs = prompts(model)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    with lk.route(model, ["two", None, "one"]):
        with pytest.raises(RouteError, match="only where generate uses its cache"):
            model.generate(**inputs, **options, num_beams=2, use_cache=False)
        cached = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, use_cache=False), cached)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_route_of_half_the_prompts_is_not_taken_for_beams(family):
    model = adapted(family)
    inputs = prompts(model, rows=4)
    with lk.route(model, ["one", "two"]):
        with pytest.raises(RouteError, match="for 2 rows, but the batch has 4"):
            model.generate(**inputs, max_new_tokens=2, pad_token_id=0)
        # After that, a right batch is right again.
        model.generate(**{k: v[:2] for k, v in inputs.items()}, num_beams=2, max_new_tokens=2)
