"""Reference implementations for tests: the hash of a base, random adapters, plain outputs."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.models.identity import weights_hash

base_hash = weights_hash
"""Of two models that must not differ in any bit."""


def randomise(model: nn.Module, name: str = "default", *, seed: int = 0, std: float = 0.2) -> None:
    """Set an adapter's weights to random numbers, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, name):
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise.to(parameter.dtype))


def attach_random(
    model: nn.Module, name: str = "default", *, seed: int = 0, std: float = 0.2, **config: Any
) -> None:
    """Attach an adapter with random weights."""
    lk.attach(model, lk.LoRAConfig(**config), name=name)
    randomise(model, name, seed=seed, std=std)


def checkpoint_blocks(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Turn activation checkpointing on; in transformers 5.17 it has another name."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)(settings)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """A model's logits without gradients."""
    with torch.no_grad():
        return model(**inputs).logits


def in_both(folder: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The first outputs of a folder's adapter on its base: here, and in PEFT."""
    from peft import PeftModel

    adapter = lk.Adapter.load(folder)
    (ours, _), (plain, _) = adapter.load_base(), adapter.load_base()
    lk.attach(ours, adapter)
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        return ours.eval()(**inputs)[0], theirs(**inputs)[0]


def alone(model: nn.Module, inputs: dict[str, Tensor], names: Sequence[Any]) -> list[Tensor]:
    """Each row's logits, computed for that row alone under its own route."""
    found = []
    for row, name in enumerate(names):
        with lk.route(model, name):
            found.append(outputs(model, {k: v[row : row + 1] for k, v in inputs.items()})[0])
    return found


def with_updates(
    base: nn.Module, adapters: dict[str, lk.Adapter], combination: dict[str, float]
) -> nn.Module:
    """A copy of a plain base with the sum of weight·scale·B·A, biases and copies in its weights."""
    plain, original = copy.deepcopy(base), dict(base.named_parameters())
    written = dict(plain.named_parameters())
    with torch.no_grad():
        for name, factor in combination.items():
            adapter = adapters[name]
            for site in adapter.sites:
                layer: Any = plain.get_submodule(site.path)
                a, b = (adapter.tensors[f"{site.name}.lora_{x}"].flatten(1).double() for x in "ab")
                delta = factor * site.scale * (b @ a)
                # A tied weight changes in this layer alone.
                layer.weight = nn.Parameter(layer.weight.clone())
                turned = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
                matrix = layer.weight.T if turned else layer.weight
                ranges = site.rows or ((0, len(matrix)),)
                chosen = [row for start, stop in ranges for row in range(start, stop)]
                matrix[chosen] += delta.reshape(matrix[chosen].shape).to(matrix.dtype)
            for key, tensor in adapter.tensors.items():
                if key in original:
                    written[key].add_(tensor - original[key], alpha=factor)
    return plain
