"""The modules of a base, and the layers that target words select there, looked up once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lorakit.config.methods import LoRAConfig
from lorakit.errors import TargetError
from lorakit.models.target_words import select_targets


@dataclass(frozen=True)
class BaseModules:
    """The modules of a base, with what is remembered of them while they are the same objects."""

    by_path: Mapping[str, nn.Module]
    """Every module by its path; the base itself by ""."""
    _selected: dict[tuple[object, ...], frozenset[str]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The base."""
        return self.by_path[""]

    def selected(self, config: LoRAConfig) -> frozenset[str]:
        """The names of the layers and slices that a configuration's targets select.

        Parameters of experts are left out: the same words of PEFT's target_modules are of modules
        alone, and it has target_parameters for those.
        """
        words = config.targets, config.layers, config.exclude
        if words not in self._selected:
            self._selected[words] = self._select(config)
        return self._selected[words]

    def _select(self, config: LoRAConfig) -> frozenset[str]:
        words, layers = config.targets, config.layers
        try:
            kept = select_targets(self.model, words, layers=layers, exclude=config.exclude)
        except TargetError:
            # The words may be those of another tool, or of a family unknown here.
            return frozenset()
        return frozenset(target.name for target in kept if target.experts is None)
