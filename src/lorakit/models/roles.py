"""The targets of a model: which layers can be adapted, and their roles."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import TargetError
from lorakit.models.base import base_modules
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.models.families import Family, RowSplit, family_name, family_of
from lorakit.models.multihead import IN_PROJ, OUT_PROJ, is_multihead
from lorakit.models.paths import ends_with, is_within
from lorakit.models.routers import is_own_kind
from lorakit.models.shape import is_encoder_decoder

EXPERT_ROLES = ("experts.gate", "experts.up", "experts.down")
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head", *EXPERT_ROLES)
"""Roles a layer can have, in the order in which messages name them."""

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer of the base, or a slice of a fused one, that can be adapted."""

    path: str
    """Dotted path of the module in the base model; of experts and in_proj, of the parameter."""
    role: str | None
    """One of `ROLES`, or None where the family's table does not name the layer."""
    rows: tuple[tuple[int, int], ...] | None
    """Half-open ranges of the fused layer's output rows; None for a whole layer."""
    experts: ExpertMatrices | None = None
    """The parameter, where it is one with a matrix for each expert."""
    multihead: str | None = None
    """The path of the nn.MultiheadAttention that reads it, which names it too."""

    @property
    def is_in_proj(self) -> bool:
        """Whether it is the parameter with q, k and v of an nn.MultiheadAttention."""
        return self.multihead is not None and self.path.rpartition(".")[2] == IN_PROJ

    @property
    def module_path(self) -> str:
        """Dotted path of the module that is adapted."""
        is_parameter = self.experts is not None or self.is_in_proj
        return self.path.rpartition(".")[0] if is_parameter else self.path

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths by which patterns and ends of paths name it."""
        return (self.path,) if self.multihead is None else (self.path, self.multihead)

    @property
    def name(self) -> str:
        """The path, with the role in brackets for a slice."""
        return self.path if self.rows is None else f"{self.path}[{self.role}]"


def targets_of(model: nn.Module) -> tuple[Target, ...]:
    """The targets of a model: every adaptable layer in module order, a fused one before its slices.

    Raises:
        TargetError: a fused layer has other rows than the model's config implies.
    """
    family = family_of(model)
    heads = task_heads(model)
    ends = _embedding_roles(model)
    found: list[Target] = []
    multiheads: set[str] = set()
    for path, module in base_modules(model):
        found.extend(_experts(path, module))
        if isinstance(module, nn.MultiheadAttention):
            found.extend(_multihead(path, module))
            multiheads.add(path)
        if is_own_kind(module):
            found.append(Target(path=path, role=None, rows=None))
        if path.rpartition(".")[0] in multiheads or not isinstance(module, _ADAPTABLE):
            continue
        inside_head = is_within(path, heads)
        role = None if inside_head else ends.get(path) or _role(family, path)
        split = None if inside_head else _longest_end(family.fused, path)
        found.append(Target(path=path, role=role, rows=None))
        if split is not None:
            found.extend(_slices(model, path, split))
    return tuple(found)


def _role(family: Family, path: str) -> str | None:
    """The role of a layer by the table of its family."""
    block, _, inside = path.rpartition(f".{family.experts}.")
    if family.experts and block:
        return family.of_each_expert.get(inside.partition(".")[2])
    return _longest_end(family.roles, path)


def _multihead(path: str, module: nn.Module) -> Iterator[Target]:
    """The targets of an nn.MultiheadAttention; its roles are those of no family."""
    for leaf in (IN_PROJ, OUT_PROJ) if is_multihead(module) else (OUT_PROJ,):
        full = f"{path}.{leaf}" if path else leaf
        yield Target(path=full, role=None, rows=None, multihead=path)


def _experts(path: str, module: nn.Module) -> Iterator[Target]:
    """The targets of a module of experts, a fused parameter before its slices."""
    for each in expert_matrices(module):
        full = f"{path}.{each.name}" if path else each.name
        yield Target(path=full, role=each.role, rows=None, experts=each)
        for role, rows in each.slices.items():
            yield Target(path=full, role=role, rows=rows, experts=each)


def shared_inputs(model: nn.Module) -> dict[str, str]:
    """The layers that read the same input as their neighbours: a name of that input, by path.

    These are q, k, v of one attention, and gate and up of one MLP.
    """
    together = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate-up", "up": "gate-up"}
    return {
        target.path: f"{target.path.rpartition('.')[0]}:{together[target.role]}"
        for target in targets_of(model)
        if target.rows is None and target.role in together
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of a language model, or None where there is none."""
    return _embedding(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that embeds a model's inputs, or None where there is none."""
    return _embedding(model, "get_input_embeddings")


def row_embedding(model: nn.Module) -> nn.Module | None:
    """The module in which a row's tokens are looked up: of an encoder-decoder, its encoder's."""
    reader = cast(Any, model).get_encoder() if is_encoder_decoder(model) else model
    return input_embedding(reader)


def task_heads(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that a task put on top of a pre-trained backbone.

    They are the children beside the backbone that have parameters, such as a classifier and the
    pooler made for it. A language model has none: what is beside its backbone was pre-trained too.
    """
    backbone = _backbone(model)
    if not backbone or output_head(model) is not None:
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if child not in backbone and any(True for _ in child.parameters())
    )


def _backbone(model: nn.Module) -> list[nn.Module]:
    """The children that hold the pre-trained model; none if `model` itself is bare."""
    prefix = getattr(model, "base_model_prefix", "")
    names = [prefix] if hasattr(model, prefix) else []
    if not names and is_encoder_decoder(model):
        # T5ForQuestionAnswering has no module around its two stacks.
        names = ["shared", "encoder", "decoder"]
    return [child for name, child in model.named_children() if name in names]


def _embedding(model: nn.Module, getter: str) -> nn.Module | None:
    """The model's input or output embedding, None if it has none or is not transformers'."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None


def never_called(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The embeddings that only hold a weight, by path, and those that are called in their place.

    The `shared` of T5, BART and their kin is what get_input_embeddings() gives; each stack looks
    its tokens up in an embedding of its own, tied to that one.
    """
    if not is_encoder_decoder(model):
        return {}
    inputs = input_embedding(model)
    ends = ("encoder.embed_tokens", "decoder.embed_tokens")
    embeddings = {p: m for p, m in base_modules(model) if isinstance(m, nn.Embedding)}
    of_stacks = {p: m for p, m in embeddings.items() if any(ends_with(p, end) for end in ends)}
    if not of_stacks or inputs in of_stacks.values():
        return {}
    return {path: tuple(of_stacks) for path, module in embeddings.items() if module is inputs}


def _embedding_roles(model: nn.Module) -> dict[str, str]:
    """The roles of the embedding and the output head, by path: the model says which they are."""
    output = output_head(model)
    inputs = input_embedding(model)
    # ViT's is a module around its convolution.
    embeddings = set() if inputs is None else set(inputs.modules())
    uncalled = never_called(model)
    if uncalled:
        called = {path for paths in uncalled.values() for path in paths}
        embeddings = {module for path, module in base_modules(model) if path in called}
    roles = {path: "embed" for path, module in base_modules(model) if module in embeddings}
    roles |= {path: "head" for path, module in base_modules(model) if module is output}
    return roles


def _slices(model: nn.Module, path: str, split: RowSplit) -> Iterator[Target]:
    """The slices of a fused layer, one a role: the roles repeat down its output rows."""
    layer = model.get_submodule(path)
    total = layer.nf if isinstance(layer, Conv1D) else layer.out_features
    assert isinstance(total, int)
    widths = split(model.config, total)
    period = sum(width for _, width in widths)
    if period == 0 or total % period:
        raise TargetError(
            f"{path} has {total} output rows, but {family_name(model)} with this config divides"
            f" them into groups of {period}: the model and its config do not belong together."
        )
    start = 0
    for role, width in widths:
        rows = tuple((at + start, at + start + width) for at in range(0, total, period))
        yield Target(path=path, role=role, rows=rows)
        start += width


def _longest_end(ends: Mapping[str, T], path: str) -> T | None:
    """The entry of the longest end that fits a path."""
    fitting = [end for end in ends if ends_with(path, end)]
    return ends[max(fitting, key=len)] if fitting else None
