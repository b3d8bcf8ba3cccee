"""What tests compare with: the hash of a base, random adapters, plain outputs."""

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach import adapter_parameters
from lorakit.models.identity import weights_hash as base_hash  # noqa: F401


def randomise(model: nn.Module, name: str = "default", *, seed: int = 0, std: float = 0.2) -> None:
    """Give an adapter random weights, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, name):
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise.to(parameter.dtype))


def attach_random(
    model: nn.Module, name: str = "default", *, seed: int = 0, **config: object
) -> None:
    """Attach an adapter with random weights."""
    lk.attach(model, lk.LoRAConfig(**config), name=name)
    randomise(model, name, seed=seed)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a model's logits without gradients."""
    with torch.no_grad():
        return model(**inputs).logits
