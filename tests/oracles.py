"""What tests compare with: hashes of a base, random adapters, and ten naive lines of mathematics."""

import hashlib

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attach import adapter_parameters
from lorakit.models.base import base_parameters


def base_hash(model: nn.Module) -> str:
    """Return a hash of the base's names, precisions and bits."""
    digest = hashlib.sha256()
    for name, parameter in base_parameters(model):
        bits = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(bits.numpy().tobytes())
    return digest.hexdigest()


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
