"""How A and B start: what holds for each init."""

import pytest
import torch
from torch import nn

import lorakit as lk


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def started(layer, **config):
    torch.manual_seed(0)
    model = One(layer)
    lk.attach(model, lk.LoRAConfig(targets=("layer",), **config))
    tensors = lk.extract(model).tensors
    return tensors["layer.lora_a"].double(), tensors["layer.lora_b"]


LAYERS = {
    "linear": lambda: nn.Linear(24, 8),
    "embedding": lambda: nn.Embedding(24, 8),
    "convolution": lambda: nn.Conv2d(6, 8, 2),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [5, 24, 40])
def test_orthogonal_rows_are_orthonormal_up_to_a_factor_and_as_large_as_kaiming_s(layer, rank):
    a, b = started(LAYERS[layer](), rank=rank, init="orthogonal")
    a = a.flatten(1)
    gram = a @ a.T if rank <= 24 else a.T @ a
    expected = torch.eye(len(gram)).double() * gram[0, 0]
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-6 * gram[0, 0].item())
    assert not b.any()
    kaiming, _ = started(LAYERS[layer](), rank=rank)
    assert a.norm().item() == pytest.approx(kaiming.norm().item(), rel=0.1)


def test_orthogonal_starts_differ_from_layer_to_layer_and_follow_the_seed():
    a, _ = started(nn.Linear(8, 8), rank=4, init="orthogonal")
    same, _ = started(nn.Linear(8, 8), rank=4, init="orthogonal")
    assert torch.equal(a, same)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lk.attach(model, lk.LoRAConfig(targets=("0", "1"), rank=4, init="orthogonal"))
    tensors = lk.extract(model).tensors
    assert not torch.equal(tensors["0.lora_a"], tensors["1.lora_a"])
