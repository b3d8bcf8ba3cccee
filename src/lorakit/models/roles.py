"""The targets of a model: which layers can be adapted, their roles, and what words select."""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.config.block_ranges import layer_numbers
from lorakit.errors import TargetError, did_you_mean
from lorakit.models.base import base_modules
from lorakit.models.experts import ExpertMatrices, expert_matrices
from lorakit.models.families import UNKNOWN_FAMILY, Family, RowSplit, family_name, family_of
from lorakit.models.linear_probe import returns_tensor
from lorakit.models.multihead import IN_PROJ, OUT_PROJ, is_multihead
from lorakit.models.paths import block_number, ends_with, is_within, matches
from lorakit.models.routers import routers

EXPERT_ROLES = ("experts.gate", "experts.up", "experts.down")
ROLES = ("q", "k", "v", "o", "gate", "up", "down", "embed", "head", *EXPERT_ROLES)
"""Roles a layer can have, in the order in which messages name them."""

GROUPS = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "experts": EXPERT_ROLES,
}
"""Words that stand for whichever of several roles the model has."""

ALL_LINEAR = "all-linear"
"""Every Linear and Conv1D but the output head and the task heads, as in PEFT, routers, and those of
nn.MultiheadAttention."""

_ADAPTABLE = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LISTED_NAMES = 20

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


def targets_by_word(
    model: nn.Module, words: Iterable[str], *, what: str = "targets"
) -> dict[str, tuple[Target, ...]]:
    """The targets that each word names, in module order.

    A word is a role or a group of roles, `all-linear`, the end of a dotted path, or a glob or
    re:REGEX over whole paths. A word for a fused layer names its slices too, so that a setting for
    the layer (leave it out, give it another rank) holds for each slice.

    Args:
        model: Any module; roles need a transformers model of a known architecture.
        words: The words to look up.
        what: Setting that the words come from, for the message.

    Raises:
        TargetError: a word names nothing in the model; all such words are listed.
    """
    words = tuple(words)
    found, problems = _look_up(model, words, what, targets_of(model) if words else ())
    _raise_any(model, problems)
    return found


def select_targets(
    model: nn.Module,
    words: Iterable[str],
    *,
    layers: str | None = None,
    exclude: Iterable[str] = (),
    what: str = "targets",
) -> tuple[Target, ...]:
    """The targets to adapt, in module order and without duplicates.

    Args:
        model: Any module; roles need a transformers model of a known architecture.
        words: What to adapt, as for `targets_by_word`; a word for a fused layer selects it whole.
        layers: Blocks to keep to, such as "0-5,11"; what is outside all blocks is left out too.
        exclude: What to leave out, in the same words.
        what: Setting that the words come from, for the message.

    Raises:
        TargetError: a word selects nothing, a block does not exist, or a fused layer is selected
            whole while a slice of it is selected or excluded; all problems are listed.
    """
    targets = targets_of(model)
    found, problems = _look_up(model, words, what, targets)
    excluded, exclude_problems = _look_up(model, exclude, "exclude", targets)
    problems += exclude_problems
    chosen = {word: _without_covered_slices(names) for word, names in found.items()}
    if layers is not None:
        problems += _missing_blocks(model, layers)
        chosen = {word: _within_blocks(model, names, layers) for word, names in chosen.items()}
    left_out = {target for names in excluded.values() for target in names}
    kept = {word: [p for p in names if p not in left_out] for word, names in chosen.items()}
    limits = [f"layers {layers!r}"] * (layers is not None) + ["exclude"] * bool(left_out)
    problems += [
        f"nothing of {word!r} is left after {' and '.join(limits)}."
        for word, names in kept.items()
        if not names
    ]
    problems += _half_chosen(kept, left_out)
    _raise_any(model, problems)
    selected = {target for names in kept.values() for target in names}
    return tuple(target for target in targets if target in selected)


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
    if not names and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
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
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
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


def _look_up(
    model: nn.Module, words: Iterable[str], what: str, targets: tuple[Target, ...]
) -> tuple[dict[str, tuple[Target, ...]], list[str]]:
    """The targets of each word that names any, and the problems of the other words."""
    found: dict[str, tuple[Target, ...]] = {}
    unknown: list[str] = []
    problems: list[str] = []
    for word in words:
        try:
            names = _named_by(word, model, targets)
        except re.error as error:
            problems.append(f"{what}: {word!r} is not a regular expression: {error}.")
            continue
        if names:
            found[word] = names
        else:
            unknown.append(word)
    if unknown:
        prefix = "" if what == "targets" else f"{what}: "
        problems.append(prefix + _unknown_words(model, unknown, targets))
    return found, problems


def _named_by(word: str, model: nn.Module, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets that a word names; where the model has the role, the role comes first."""
    roles = GROUPS.get(word, (word,))
    by_role = tuple(target for target in targets if target.role in roles)
    if by_role:
        return by_role
    if word == ALL_LINEAR:
        linear = _linear_paths(model)
        return tuple(t for t in targets if t.path in linear and t.multihead is None)
    if word.startswith("re:"):
        pattern = word.removeprefix("re:")
        re.compile(pattern)
        return tuple(t for t in targets if any(matches(pattern, path) for path in t.paths))
    if "*" in word or "?" in word:
        return tuple(t for t in targets if any(fnmatch.fnmatchcase(p, word) for p in t.paths))
    return tuple(t for t in targets if any(ends_with(p, word) for p in (*t.paths, t.name)))


def _linear_paths(model: nn.Module) -> set[str]:
    """The paths of the layers that `all-linear` names."""
    left_out = (*task_heads(model), *routers(model))
    output = output_head(model)
    return {
        path
        for path, module in base_modules(model)
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and not is_within(path, left_out)
        and returns_tensor(module)
    }


def _unknown_words(model: nn.Module, words: list[str], targets: tuple[Target, ...]) -> str:
    """The message for words that name nothing: the nearest words, and what the model has."""
    roles = [role for role in ROLES if any(target.role == role for target in targets)]
    candidates = {*roles, *GROUPS, ALL_LINEAR}
    shown = ", ".join(repr(word) + _nearest(word, candidates, targets) for word in words)
    text = f"{family_name(model)} has no layer{'s' if len(words) > 1 else ''} called {shown}."
    if family_of(model) is not UNKNOWN_FAMILY:
        own = [role for role in roles if role not in ("embed", "head")]
        return f"{text} Its layers are {', '.join(own)}."
    if any(word in ROLES or word in GROUPS for word in words):
        text += " lorakit does not know the roles of this architecture: name its modules instead."
    leaves = list(dict.fromkeys(_last_parts(target.path, 1) for target in targets))
    more = ", …" if len(leaves) > _LISTED_NAMES else ""
    return f"{text} Its modules are {', '.join(leaves[:_LISTED_NAMES])}{more}."


def _nearest(word: str, candidates: Set[str], targets: tuple[Target, ...]) -> str:
    """A hint, " (did you mean 'x'?)", at the nearest word that would name something; else ""."""
    depth = word.count(".") + 1
    ends = dict.fromkeys(_last_parts(target.path, depth) for target in targets)
    hint = did_you_mean(word, [*(candidates - {word}), *ends]).removeprefix("; ")
    return f" ({hint})" if hint else ""


def _missing_blocks(model: nn.Module, layers: str) -> list[str]:
    """The problem, if any, of a range of blocks that goes past the model's last block."""
    heads = task_heads(model)
    paths = [target.path for target in targets_of(model) if not is_within(target.path, heads)]
    last = max((number for path in paths if (number := block_number(path)) is not None), default=-1)
    if max(layer_numbers(layers)) <= last:
        return []
    return [
        f"layers {layers!r} goes up to block {max(layer_numbers(layers))},"
        f" but {family_name(model)} has {last + 1} blocks, counted from 0."
    ]


def _within_blocks(model: nn.Module, chosen: tuple[Target, ...], layers: str) -> tuple[Target, ...]:
    """The targets inside one of the blocks."""
    numbers, heads = layer_numbers(layers), task_heads(model)
    return tuple(
        target
        for target in chosen
        if block_number(target.path) in numbers and not is_within(target.path, heads)
    )


def _without_covered_slices(chosen: tuple[Target, ...]) -> tuple[Target, ...]:
    """The targets without those slices whose whole layer is there too."""
    whole = {target.path for target in chosen if target.rows is None}
    return tuple(target for target in chosen if target.rows is None or target.path not in whole)


def _half_chosen(kept: Mapping[str, Iterable[Target]], left_out: set[Target]) -> list[str]:
    """A line for each fused layer that one word chooses whole, and another by slice."""
    by_word = [(target, repr(word)) for word, names in kept.items() for target in names]
    slices = [*by_word, *((target, "exclude") for target in left_out)]
    slice_of = {target.path: (target, who) for target, who in slices if target.rows is not None}
    problems: dict[tuple[str, str], str] = {}
    for whole, word in by_word:
        if whole.rows is None and whole.path in slice_of:
            part, who = slice_of[whole.path]
            problem = (
                f"{word} names {whole.path} as a whole and {who} names its slice {part.role!r}:"
                " name either the layer or its slices."
            )
            problems.setdefault((word, who), problem)
    return list(problems.values())


def _raise_any(model: nn.Module, problems: list[str]) -> None:
    """Raise one TargetError for all problems, if there are any."""
    if len(problems) == 1:
        raise TargetError(problems[0])
    if problems:
        raise TargetError.listing(f"the layers of {family_name(model)} cannot be chosen", problems)


def _longest_end(ends: Mapping[str, T], path: str) -> T | None:
    """The entry of the longest end that fits a path."""
    fitting = [end for end in ends if ends_with(path, end)]
    return ends[max(fitting, key=len)] if fitting else None


def _last_parts(path: str, count: int) -> str:
    """The last components of a dotted path."""
    return ".".join(path.split(".")[-count:])
