"""The roofline: counts beside torch's own, the parts of a profile, the whole on a tiny model."""

import json

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.utils.flop_counter import FlopCounterMode

import lorakit as lk
from lorakit.bench.roofline import RooflineConfig, measure_roofline
from lorakit.bench.roofline_ceilings import Ceilings, ceilings
from lorakit.bench.roofline_counts import PARTS, Batch, Shape, Work, block_layers, count
from lorakit.bench.roofline_profile import FORWARD, REST, Sorter, medians
from lorakit.bench.tables import table
from lorakit.cli.main import main
from lorakit.data.encode import Example
from lorakit.errors import ModelError
from tiny_models import build

ROWS = [
    Example(input_ids=[1, 2, 3, 4], labels=[-100, -100, 3, 4]),
    Example(input_ids=[5, 6], labels=[5, 6]),
]


@pytest.fixture
def shape():
    """The sizes of a tiny model: 2 blocks, width 32, MLP 48, 4 heads of 8, 2 of keys."""
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q", "v")))
    return Shape.of(model, "default")


def test_a_batch_counts_tokens_labels_and_pairs():
    # The first token of a row is given, so its label is not learnt.
    assert Batch.of(ROWS) == Batch(tokens=6, labelled=3, pairs=10 + 3)


def test_sizes_are_those_of_the_model(shape):
    q, k, o, mlp = (32, 32), (16, 32), (32, 32), [(48, 32), (48, 32), (32, 48)]
    assert sorted(shape.weights) == sorted(2 * [q, k, k, o, *mlp])
    assert shape.without_input_gradient == 32 * (32 + 16 + 16)
    assert shape.adapter == 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert (shape.layers, shape.width, shape.inner, shape.vocabulary) == (2, 32, 48, 64)
    assert (shape.queries, shape.keys, shape.item) == (32, 16, 4)


def test_operations_are_those_that_torch_counts(shape):
    """Of frozen weights, above outputs of q, k, v in the first block that ask for gradients."""
    model = build("llama").requires_grad_(False)
    model.set_attn_implementation("eager")
    attention = model.model.layers[0].self_attn
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        layer.register_forward_hook(lambda layer, inputs, output: output.requires_grad_())
    row = Example(input_ids=list(range(1, 8)), labels=list(range(1, 8)))
    with FlopCounterMode(display=False) as counter:
        # All positions but the last are asked for, and predict a labelled token.
        kept = torch.arange(6)
        model(input_ids=torch.tensor([row.input_ids]), logits_to_keep=kept).logits.sum().backward()
    batch = Batch.of([row])
    work = {part: each.operations for part, each in count(shape, batch).items()}
    # torch counts the pairs that the mask hides, too: 7 · 7.
    attended = work["attention"] / batch.pairs * 49
    expected = work["blocks forward"] + work["blocks backward"] + work["head"] + attended
    rotary = 2 * 4 * batch.tokens
    assert counter.get_total_flops() == pytest.approx(expected, abs=rotary)


def test_the_adapters_cost_three_times_their_forward_pass(shape):
    assert count(shape, Batch.of(ROWS))["adapters"].operations == 3 * 2 * 6 * shape.adapter


def test_a_part_takes_at_least_its_operations_and_its_bytes():
    work = Work(operations=100, bytes=10)
    assert work.seconds(operations_per_s=10.0, bytes_per_s=10.0) == 10.0
    assert work.seconds(operations_per_s=1000.0, bytes_per_s=5.0) == 2.0


def test_a_model_that_is_built_otherwise_is_refused():
    with pytest.raises(ModelError, match="as Llama has; this gpt_neox has 8 in 2 blocks"):
        block_layers(build("gpt_neox"))


def event(name, start=0.0, *, took=1.0, shapes=()):
    """An event of a profile, which begins and takes so many seconds."""
    begun, ended = start * 1e6, (start + took) * 1e6
    return FunctionEvent(0, name, 0, begun, ended, input_shapes=list(shapes))


def test_operators_are_charged_to_their_parts():
    events = [
        event(FORWARD, 0, took=10),
        event("aten::mm", 0, shapes=[[6, 32], [32, 48]]),
        event("aten::mm", 1, took=2, shapes=[[6, 32], [32, 2]]),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 3, took=3),
        event("aten::addmm", 6, took=2, shapes=[[64], [3, 32], [32, 64]]),
        event("aten::silu", 8, took=0.5),
        event("autograd::engine::evaluate_function: MmBackward0", 10, took=4),
        event("aten::mm", 11, took=2.5, shapes=[[48, 32], [32, 32]]),
        event("Optimizer.step#AdamW.step", 20, took=2),
        event("aten::mul", 20.5, took=0.25),
    ]
    found = Sorter(vocabulary=64, narrow=4).seconds(events)
    assert found == pytest.approx(
        {
            "blocks forward": 1.0,
            "adapters": 2.0,
            "attention": 3.0,
            "head": 2.0,
            "elementwise": 0.5,
            "blocks backward": 2.5,
            "optimizer": 0.25,
            REST: 22.0 - 11.25,
        }
    )


def test_the_median_step_is_that_of_each_part():
    assert medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}


def test_ceilings_are_measured_for_the_products_of_the_step():
    found = ceilings(build("llama"), Batch.of(ROWS), repeats=1)
    assert set(found.alone_s) == {"blocks forward", "blocks backward", "head"}
    assert min(found.operations_per_s, found.bytes_per_s, *found.alone_s.values()) > 0


@pytest.fixture
def no_ceilings(monkeypatch):
    """Leave out the measurement of the machine, which takes seconds."""
    made = Ceilings(operations_per_s=1e9, bytes_per_s=1e9, alone_s={"head": 0.5})
    monkeypatch.setattr("lorakit.bench.roofline.ceilings", lambda *args, **keywords: made)


def test_the_result_has_every_part_with_its_limit(
    tiny_llama, prompt_rows, tmp_path, capsys, no_ceilings
):
    words = ["bench", "roofline", "--model", tiny_llama, "--data.train", prompt_rows, "--json"]
    words += ["--batch-size", 3, "--rank", 2, "--repeats", 2, "--out", tmp_path / "roofline.json"]
    code = main(list(map(str, words)))
    result = json.loads(capsys.readouterr().out)
    assert code == 0, result
    *rows, rest = result["tables"]["roofline"]
    assert [row["part"] for row in rows] == list(PARTS)
    for row in rows:
        assert row["times its limit"] == pytest.approx(row["measured_s"] / row["limit_s"])
        assert row["measured_s"] > 0, row["part"]
    assert rest["part"] == REST
    assert len(result["seconds"]["step"]["ours"]["turns"]) == 2
    assert result["checks"]["next_gain"].endswith("of the step above its limit")
    assert "next gain: " in table(result)


def test_a_model_that_cannot_be_counted_is_refused_before_it_is_trained(
    tiny_llama, prompt_rows, monkeypatch
):
    monkeypatch.setattr("lorakit.bench.roofline_counts.block_layers", lambda model: refuse())
    monkeypatch.setattr("lorakit.bench.roofline.execute", None)

    def refuse():
        raise ModelError("no")

    settings = RooflineConfig(
        model=str(tiny_llama), data=lk.DataConfig(train=str(prompt_rows)), batch_size=2
    )
    with pytest.raises(ModelError, match="no"):
        measure_roofline(settings)
