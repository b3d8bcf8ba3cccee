"""A merge that changes the outputs by more than rounding explains is taken back."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.attachment.state import active_name
from lorakit.errors import MergeError
from lorakit.merging.rounding import LIMIT
from references import base_hash, outputs, randomise
from tiny_models import build, example_inputs

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "merge_rounding.json"


class Doubles(nn.Linear):
    """A layer that computes something else from its weight than LoRA knows, where it matters."""

    def forward(self, x):
        return super().forward(x) * (1 + (x.shape[-2] > 3))


def test_a_merge_that_does_something_else_is_taken_back():
    model = build("llama")
    for block in model.model.layers:
        block.mlp.down_proj.__class__ = Doubles
    before = base_hash(model)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q", "down")))
    randomise(model, std=1.0)
    inputs = example_inputs(model)
    want = outputs(model, inputs)
    with pytest.raises(MergeError, match="does something else than attached"):
        lk.merge(model)
    assert torch.equal(outputs(model, inputs), want)
    assert active_name(model) == "default"
    lk.detach(model)
    assert base_hash(model) == before


def test_the_limit_is_well_beyond_every_right_merge_that_was_measured():
    found = json.loads(RESULT.read_text())
    assert found["limit"] == LIMIT
    assert 4 * found["largest"]["ratio"] < LIMIT
    lost = {k: v for k, v in found["one_layer_lost"].items() if k.startswith("float32")}
    assert min(each["median"] for each in lost.values()) > 10 * LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_error(dtype):
    model = build("llama").to(dtype)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("all-linear",)))
    for std in (1e-4, 0.1, 1.0):
        randomise(model, std=std)
        assert lk.merge(model).logit_change is not None
        lk.unmerge(model)
        assert lk.merge(model, round_to=torch.bfloat16).logit_change is not None
        lk.unmerge(model)
