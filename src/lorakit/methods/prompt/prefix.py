"""PreEmbed and PreLayer: virtual tokens around the prompt (section 5.1).

Virtual tokens have ids beyond the base's vocabulary, so that rows which hold them are padded and
joined as any others. Where they stand in a batch is noted when the model is called
(`methods/prompt/hooks.py`); here their vectors take the place of what the base computes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.config.methods import PrefixConfig
from lorakit.data.virtual_tokens import VirtualTokens
from lorakit.errors import RouteError, TargetError
from lorakit.layers.adapted_layer import AdaptedLayer
from lorakit.layers.operation import Update
from lorakit.layers.token_positions import TokenPositions
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.prompt.init import Start
from lorakit.models.base import base_modules
from lorakit.models.blocks import blocks, named_modules
from lorakit.models.families import family_name
from lorakit.models.paths import is_within
from lorakit.models.roles import row_embedding
from lorakit.models.shape import context_length, hidden_size, is_causal, is_encoder_decoder


def components(model: nn.Module, config: PrefixConfig) -> tuple[Component, ...]:
    """The virtual tokens: d·(l_p + l_i) values of PreEmbed, L·d·(l_p + l_i) of PreLayer.

    PreLayer has vectors for the embedding and behind every block but the last, whose output at the
    last of these tokens is what predicts the answer.

    Raises:
        TargetError: the model has no embedding of tokens, its blocks are not known, its context has
            no room for so many tokens, or it is an encoder-decoder that does not write.
    """
    path, embedding = input_embedding(model)
    tokens = VirtualTokens(
        first=embedding.num_embeddings,
        prefix=config.prefix,
        infix=config.infix,
        causal=is_encoder_decoder(model) or is_causal(model),
    )
    _check_room(model, tokens)
    behind = _replaced_blocks(model, config) if config.every_layer else ()
    start = Start(config=config, count=len(tokens), embedding=path, blocks=behind)
    width = _width(model) if behind else 0
    inner = tuple(
        VirtualTokenVectors(
            path=block,
            method=config.method,
            shape=(len(tokens), width),
            start=start,
        )
        for block in behind
    )
    first = VirtualTokenVectors(
        path=path,
        method=config.method,
        shape=(len(tokens), embedding.embedding_dim),
        start=start,
        tokens=tokens,
    )
    return (first, *inner)


def input_embedding(model: nn.Module) -> tuple[str, nn.Embedding]:
    """The path and the module of the embedding that rows are looked up in.

    Raises:
        TargetError: there is none, or an encoder-decoder does not write.
    """
    name = family_name(model)
    if is_encoder_decoder(model) and not cast(Any, model).can_generate():
        raise TargetError(
            f"{name} has an encoder and a decoder, and {type(model).__name__} gives the decoder the"
            " encoder's row, whose virtual tokens are none of the decoder's"
        )
    embedding = row_embedding(model)
    for path, module in base_modules(model):
        if module is embedding and isinstance(module, nn.Embedding):
            return path, module
    raise TargetError(f"{name} has no embedding of tokens, which virtual tokens would follow")


def _check_room(model: nn.Module, tokens: VirtualTokens) -> None:
    context = context_length(model)
    if context is not None and len(tokens) >= context:
        raise TargetError(
            f"prefix {tokens.prefix} and infix {tokens.infix} are {len(tokens)} tokens, which "
            f"leaves no room for a row in the model's context of {context}"
        )


def _replaced_blocks(model: nn.Module, config: PrefixConfig) -> tuple[str, ...]:
    """The paths of all blocks but the last.

    Raises:
        TargetError: they are not known.
    """
    if config.blocks:
        return named_modules(model, config.blocks, what="prefix.blocks")[:-1]
    try:
        found = tuple(block.path for block in blocks(model))
    except TargetError as error:
        raise TargetError(f"{error}: name them in order with prefix.blocks") from None
    if is_encoder_decoder(model):
        encoder = cast(Any, model).get_encoder()
        inside = [path for path, module in base_modules(model) if module is encoder]
        found = tuple(path for path in found if is_within(path, inside))
    return found[:-1]


def _width(model: nn.Module) -> int:
    size = hidden_size(model)
    if size is None:
        raise TargetError("the model's config has no hidden_size, which its blocks' vectors need")
    return size


@dataclass(frozen=True, kw_only=True)
class VirtualTokenVectors(Component):
    """The vectors of virtual tokens behind one module: the input embedding, or a block."""

    shape: tuple[int, int]
    """(tokens, d)."""
    start: Start = field(compare=False, repr=False)
    tokens: VirtualTokens | None = None
    """The tokens themselves, at the input embedding."""

    what = "virtual tokens"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of the vectors."""
        return {f"{self.path}.prompt": self.shape}

    def update(self, materials: Materials) -> Update:
        """The update of the module."""
        modules = materials.modules
        device = next(modules[self.path].parameters()).device
        (name,) = self.shapes
        vectors = materials.tensor(
            name, device, lambda: self.start.of(modules, self.path, self.shape)
        )
        if self.tokens is None:
            return TokenVectors(vectors)
        return TokenEmbeddings(vectors, self.tokens)


def _positions_in(layer: nn.Module) -> TokenPositions | None:
    """The positions of the virtual tokens in a layer's rows; None: they have none.

    Raises:
        RouteError: no call of the model is under way, which alone knows.
    """
    frames = cast(AdaptedLayer, layer).adapter_route.own.stack
    if not frames:
        raise RouteError(
            "the adapter in use has virtual tokens, which the model itself puts into its rows: "
            "call the model, not a part of it, or switch the adapter off"
        )
    return frames[-1].tokens


class TokenVectors(Update):
    """Replaces a block's output at the virtual tokens."""

    is_whole = True

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(vectors, requires_grad=False)

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the vectors at their places.

        Raises:
            RouteError: no call of the model is under way.
        """
        tokens = _positions_in(layer)
        return output if tokens is None else tokens.put(self.prompt, output)

    def why_unmergeable(self, layer: nn.Module) -> str | None:
        """The reason why no weights can hold it."""
        return "it adds tokens to each row, which weights can't, so its latency stays"

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: see `why_unmergeable`."""
        yield from ()

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the vectors."""
        yield f"{path}.prompt", self.prompt


class TokenEmbeddings(TokenVectors):
    """Replaces what the input embedding finds for the virtual tokens."""

    def __init__(self, vectors: Tensor, tokens: VirtualTokens) -> None:
        super().__init__(vectors)
        self.virtual_tokens = tokens

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the vectors at their places, where the layer got such tokens.

        GPT-2 looks its token types up in the same embedding.

        Raises:
            RouteError: no call of the model is under way.
        """
        tokens = _positions_in(layer)
        return tokens.put(self.prompt, output) if tokens is not None and tokens.embedded else output
