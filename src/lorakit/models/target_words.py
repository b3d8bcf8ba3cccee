"""The words that select targets: roles, groups of roles, ends of paths, globs, patterns."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Set

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.config.block_ranges import layer_numbers
from lorakit.errors import TargetError, did_you_mean
from lorakit.models.base import base_modules
from lorakit.models.families import UNKNOWN_FAMILY, family_name, family_of
from lorakit.models.linear_probe import returns_tensor
from lorakit.models.paths import block_number, ends_with, is_within, matches
from lorakit.models.roles import EXPERT_ROLES, ROLES, Target, output_head, targets_of, task_heads
from lorakit.models.routers import routers

GROUPS = {
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
    "experts": EXPERT_ROLES,
}
"""Words that stand for whichever of several roles the model has."""

ALL_LINEAR = "all-linear"
"""Every Linear and Conv1D but the output head and the task heads, as in PEFT, routers, and those of
nn.MultiheadAttention."""

_LISTED_NAMES = 20


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


def _last_parts(path: str, count: int) -> str:
    """The last components of a dotted path."""
    return ".".join(path.split(".")[-count:])
