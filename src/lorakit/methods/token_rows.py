"""Rows of single tokens, trained in the place of the base's: those of new words, for example.

What computes logits with the embedding's own weight has the trained rows too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.config.base import dtype_name
from lorakit.config.methods import LoRAConfig
from lorakit.errors import TargetError, did_you_mean
from lorakit.layers.operation import Update
from lorakit.methods.component import Component, Materials, Shape
from lorakit.methods.lora.lora import why_not_adaptable
from lorakit.models.base import base_modules, device_of
from lorakit.models.linear_probe import own_class
from lorakit.models.quantized_weight import is_quantized
from lorakit.models.roles import input_embedding
from lorakit.upstream.private_names import own_parameters

INPUT = "embed"
"""The word for the embedding of a model's inputs."""


class TokenRowsUpdate(Update):
    """Trained rows of an embedding, or of the linear layer that has its weight."""

    def __init__(self, rows: nn.Parameter, tokens: Sequence[int], *, is_tied: bool) -> None:
        """Take the rows.

        Args:
            rows: one for each token, (tokens, d).
            tokens: their numbers, each once.
            is_tied: whether the rows are those of another module's update.
        """
        super().__init__()
        self.rows = rows
        vars(self)["is_tied"] = is_tied
        index = torch.tensor(tokens, device=rows.device)
        in_order, places = index.sort()
        for name, buffer in (("index", index), ("in_order", in_order), ("places", places)):
            self.register_buffer(name, buffer, persistent=False)

    index: Tensor
    """The tokens, int64."""
    in_order: Tensor
    """The tokens, the lowest first."""
    places: Tensor
    """The row of each token in that order."""
    is_tied: bool

    def adapt(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the trained rows' embeddings, or their logits."""
        x = inputs[0]
        if isinstance(layer, nn.Linear):
            # The difference, so that rows which are the base's leave every bit as it is.
            change = self.rows - cast(Tensor, own_parameters(layer)["weight"])[self.index]
            logits = F.linear(x, change.to(x.dtype))
            return output.index_add(-1, self.index, logits.to(output.dtype))
        at = torch.searchsorted(self.in_order, x).clamp(max=len(self.index) - 1)
        rows = F.embedding(self.places[at], self.rows).to(output.dtype)
        # Gemma's embedding multiplies what it looks up.
        rows = rows * getattr(layer, "embed_scale", 1.0)
        return torch.where((self.in_order[at] == x)[..., None], rows.to(output.dtype), output)

    def read(self, name: str, weight: Tensor, *, inside: bool) -> Tensor:
        """The weight with the trained rows."""
        if inside or name != "weight":
            return weight
        return weight.index_copy(0, self.index, self.rows.to(weight.dtype))

    @property
    def summary(self) -> str:
        """How many rows it has, for `print(model)`."""
        return f"rows of {len(self.index)} tokens"

    def merged(self, layer: nn.Module, *, exact: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the weight with the trained rows."""
        weight = cast(Tensor, own_parameters(layer)["weight"]).detach().to(exact)
        yield "weight", weight.index_copy(0, self.index, self.rows.detach().to(exact))

    def named_tensors(self, path: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the rows, but for those of another module."""
        if not self.is_tied:
            yield f"{path}.token_rows", self.rows


@dataclass(frozen=True, kw_only=True)
class TokenRows(Component):
    """The rows of some tokens in one module."""

    tokens: tuple[int, ...]
    width: int
    """Values of a row."""
    dtype: str
    """Precision of the trained rows."""
    tied_to: str | None = None
    """The module whose trained rows these are, too."""

    step = 1
    reads_base = True

    @property
    def what(self) -> str:
        """The number of rows, or where they are from."""
        return f"rows of {self.tied_to}" if self.tied_to else f"{len(self.tokens)} rows"

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """The rows, (tokens, d); nothing where they are another module's."""
        shape = (len(self.tokens), self.width)
        return {} if self.tied_to else {f"{self.path}.token_rows": shape}

    def update(self, materials: Materials) -> TokenRowsUpdate:
        """The update of the module, whose fresh rows are the base's own."""
        layer = materials.modules[self.path]
        weight = cast(nn.Parameter, own_parameters(layer)["weight"])
        if self.tied_to:
            rows = materials.tied[id(weight)]
        else:
            (name,), dtype = self.shapes, getattr(torch, self.dtype)
            values = materials.tensor(
                name, device_of(layer), lambda: weight.detach()[list(self.tokens)].to(dtype)
            )
            rows = nn.Parameter(values, requires_grad=False)
            materials.tied.setdefault(id(weight), rows)
        return TokenRowsUpdate(rows, self.tokens, is_tied=self.tied_to is not None)


def components(model: nn.Module, config: LoRAConfig) -> tuple[TokenRows, ...]:
    """The rows that LoRA's settings name, and what is tied to an embedding among them.

    Raises:
        TargetError: a word names nothing, or something without rows of tokens; or a token is beyond
            the vocabulary.
    """
    chosen = _chosen(model, config)
    first: dict[int, TokenRows] = {}
    found = []
    for path, module in base_modules(model) if chosen else ():
        weight = own_parameters(module).get("weight")
        owner = first.get(id(weight))
        tokens = chosen.get(path, () if owner is None else owner.tokens)
        if weight is None or not tokens or not isinstance(module, nn.Embedding | nn.Linear):
            continue
        is_same = owner is not None and owner.tokens == tokens
        made = TokenRows(
            path=path,
            method=config.method,
            tokens=tokens,
            width=weight.shape[1],
            dtype=dtype_name(config.dtype),
            tied_to=owner.path if owner is not None and is_same else None,
        )
        found.append(made)
        if isinstance(module, nn.Embedding):
            first.setdefault(id(weight), made)
    return tuple(found)


def _chosen(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The tokens of each module that the settings name.

    Raises:
        TargetError: see `components`; all problems are listed.
    """
    modules = dict(base_modules(model)) if config.trainable_token_indices else {}
    chosen: dict[str, tuple[int, ...]] = {}
    problems = []
    for word, tokens in config.tokens_by_module.items():
        paths = _named(model, modules, word)
        if not paths:
            leaves = sorted({path.rpartition(".")[2] for path in modules if path})
            problems.append(f"no module is called {word!r}{did_you_mean(word, leaves)}")
        for path in paths:
            problems += _problems(path, modules[path], tokens)
            chosen[path] = tuple(tokens)
    if problems:
        raise TargetError.listing("trainable_token_indices can't be trained here", problems)
    return chosen


def _named(model: nn.Module, modules: Mapping[str, nn.Module], word: str) -> list[str]:
    embedding = input_embedding(model) if word == INPUT else None
    if embedding is not None:
        return [path for path, module in modules.items() if module is embedding]
    return [path for path in modules if path == word or path.endswith(f".{word}")]


def _problems(path: str, module: nn.Module, tokens: Sequence[int]) -> Iterator[str]:
    """Yield a line for each reason why rows of a module can't be trained."""
    kind = own_class(module).__name__
    if not isinstance(module, nn.Embedding | nn.Linear):
        yield f"{path} is a {kind}, which has no row for each token"
    elif is_quantized(module):
        yield f"{path} is quantised, so its rows can't be trained"
    elif reason := why_not_adaptable(module):
        yield f"{path} is a {kind}: {reason}"
    elif (most := max(tokens)) >= len(cast(Tensor, own_parameters(module)["weight"])):
        rows = len(cast(Tensor, own_parameters(module)["weight"]))
        yield f"{path} has {rows} rows, and token {most} is named: resize the embedding first"


def clashes(components: Iterable[Component]) -> Iterator[str]:
    """Yield a line for each module whose rows are trained and which is changed otherwise, too."""
    found = list(components)
    rows = {each.path for each in found if isinstance(each, TokenRows)}
    for each in found:
        if each.path in rows and not isinstance(each, TokenRows):
            yield f"{each.path}  has trained rows of tokens and a {each.what}: leave one out"


def with_paths(config: LoRAConfig, rows: Iterable[TokenRows]) -> LoRAConfig:
    """Settings whose words are the paths of the modules that hold trained rows."""
    own = {each.path: list(each.tokens) for each in rows if each.tied_to is None}
    return config.model_copy(update={"trainable_token_indices": own}) if own else config
