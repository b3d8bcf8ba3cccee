"""Models that PEFT and lorakit adapt alike, and what PEFT warns of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_models import build, example_inputs

# What PEFT says of the settings of these tests, and of its own affairs.
PEFTS_WARNINGS = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`",
    "ignore:Setting `save_embedding_layers` to `True`",
    "ignore:Could not identify embedding layer",
    "ignore:LoRA adapter added to ConvNd layer with groups > 1",
    "ignore:Adapter 'default'",
    "ignore:Model has `tie_word_embeddings=True`",
)
Settings = dict[str, Any]


class Convolutions(nn.Module):
    """Convolutions; without dilation and padding modes, which PEFT's A leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (1, 3), groups=2, padding=1)
        self.point = nn.Conv2d(8, 4, 1)
        self.time = nn.Conv1d(4, 5, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, 5, length)."""
        x = self.point(self.grouped(self.image(x)))
        return self.time(x.flatten(2))


class Tables(nn.Module):
    """An embedding and a head, with biases, in no way like a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, length, 3)."""
        return self.head(self.body(self.table(x)))


def make(family: str) -> nn.Module:
    own = {"convolutions": Convolutions, "tables": Tables}
    if family not in own:
        return build(family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return own[family]().eval()


def output(model: nn.Module, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if family == "convolutions":
            return model(torch.randn(2, 3, 9, 9, generator=generator))
        if family == "tables":
            return model(torch.randint(0, 20, (2, 5), generator=generator))
        return model(**example_inputs(make(family))).logits


def shake(parameters: list[nn.Parameter]) -> None:
    """Move what is trained away from its start, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def trained(parameters: Any) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
