"""The modules that settings name to be copied in full, and copies of weights that are tied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from lorakit.config.methods import FullConfig, MethodConfig
from lorakit.errors import TargetError, did_you_mean
from lorakit.methods.lora.tied import any_ties, tied_to
from lorakit.methods.module_copy import TrainedCopy, trained_copy
from lorakit.models.base import base_modules, base_parameters
from lorakit.models.roles import task_heads


def modules_to_save(model: nn.Module, configs: Sequence[MethodConfig]) -> list[TrainedCopy]:
    """The copies that settings name, and those of what is tied to them if LoRA's ask for it.

    Raises:
        TargetError: no module has such a name.
    """
    return [
        trained_copy(model, path, configs[0].method, dtype=config.dtype)
        for config in configs
        for path in _paths(model, config)
    ]


def with_ties(
    model: nn.Module, copies: Iterable[TrainedCopy], configs: Sequence[MethodConfig]
) -> Iterator[TrainedCopy]:
    """Yield copies in which a parameter that several of them share counts once.

    In full fine-tuning it has its first name alone. LoRA's modules_to_save are copies apart, as
    they are in PEFT, unless ensure_weight_tying ties them: then it has every name, as in PEFT.
    """
    every = any(isinstance(config, FullConfig) for config in configs)
    if not every and not any_ties(configs):
        yield from copies
        return
    seen: set[int] = set()
    for each in copies:
        own = dict(base_parameters(model.get_submodule(each.path)))
        again = frozenset(name for name in each.sizes if id(own[name]) in seen)
        seen |= set(map(id, own.values()))
        sizes = {name: size for name, size in each.sizes.items() if not (every and name in again)}
        yield replace(each, sizes=sizes, keeps_ties=True, again=frozenset() if every else again)


def _paths(model: nn.Module, config: MethodConfig) -> list[str]:
    """The paths of the modules that settings name to be copied, and of what is tied to them."""
    paths = _named_modules(model, config.modules_to_save)
    return [*paths, *tied_to(model, paths)] if any_ties((config,)) else paths


def _named_modules(model: nn.Module, words: Sequence[str]) -> list[str]:
    names = [path for path, _ in base_modules(model)]
    paths: list[str] = []
    for word in words:
        if word == "auto":
            paths += task_heads(model)
            continue
        found = [path for path in names if path == word or path.endswith(f".{word}")]
        if not found:
            leaves = sorted({path.rpartition(".")[2] for path in names if path})
            hint = did_you_mean(word, leaves)
            raise TargetError(f"modules_to_save: no module is called {word!r}{hint}")
        paths += [path for path in found if path not in paths]
    return paths
