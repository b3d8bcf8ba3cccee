"""How virtual tokens start: as tokens of the vocabulary, or at random."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config.base import dtype_name
from lorakit.config.methods import PrefixConfig
from lorakit.layers.adapted_layer import AdaptedLayer, adapted_layers
from lorakit.layers.route import Frame
from lorakit.models.base import in_eval_mode
from lorakit.models.shape import is_encoder_decoder


@dataclass(frozen=True, kw_only=True)
class Start:
    """The starting vectors of all modules of one adapter, which are found together."""

    config: PrefixConfig
    count: int
    """How many virtual tokens there are."""
    embedding: str
    """Path of the input embedding."""
    blocks: tuple[str, ...]
    """Paths of the blocks whose output is replaced."""
    _found: dict[str, Tensor] = field(default_factory=dict)

    def of(self, modules: Mapping[str, nn.Module], path: str, shape: tuple[int, int]) -> Tensor:
        """The vectors of one module (count, d), in the settings' precision.

        Random numbers come from torch's global generator.
        """
        dtype = getattr(torch, dtype_name(self.config.dtype))
        weight: Any = modules[self.embedding].weight
        if weight.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        if self.config.init == "random":
            spread = float(weight.detach().float().std())
            scale = float(getattr(modules[self.embedding], "embed_scale", 1.0))
            return (torch.randn(shape) * spread * scale).to(dtype)
        if not self._found:
            tokens = torch.randint(weight.shape[0], (self.count,)).to(weight.device)
            self._found.update(outputs(modules[""], tokens, [self.embedding, *self.blocks]))
        return self._found[path].to(dtype)


@torch.no_grad()
def outputs(model: nn.Module, tokens: Tensor, paths: Sequence[str]) -> dict[str, Tensor]:
    """The base's output behind each module for a row of tokens: (tokens, d)."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            found.setdefault(path, states[0].clone())

        return hook

    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(note(path))
            stack.callback(handle.remove)
        stack.enter_context(_as_the_base(model))
        reader: Any = model
        if is_encoder_decoder(model):
            reader = reader.get_encoder()
        reader(input_ids=tokens[None], attention_mask=torch.ones_like(tokens[None]))
    return found


@contextmanager
def _as_the_base(model: nn.Module) -> Iterator[None]:
    """Let a model answer without adapters and dropout inside a block."""
    adapted: AdaptedLayer | None = next((layer for _, layer in adapted_layers(model)), None)
    with (
        in_eval_mode(model),
        nullcontext() if adapted is None else adapted.adapter_route.block(Frame()),
    ):
        yield
