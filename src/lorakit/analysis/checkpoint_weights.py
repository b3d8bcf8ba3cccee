"""The weights of a model that was fine-tuned in full beside those of its base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lorakit.adapter.site import Site
from lorakit.analysis.base_weights import Change
from lorakit.analysis.delta import DenseDelta
from lorakit.attachment.attach import plan
from lorakit.config.methods import LoRAConfig
from lorakit.errors import AnalysisError
from lorakit.methods.lora.lora import matrix_of
from lorakit.models.base import base_modules, base_parameters, unwrapped


class CheckpointWeights:
    """What full fine-tuning changed in some layers of a base."""

    def __init__(self, model: nn.Module, tuned: nn.Module, targets: Sequence[str] | str) -> None:
        """Make sure that both models have the layers, in the same shapes and in memory.

        Args:
            model: the base.
            tuned: the same model after fine-tuning.
            targets: the layers, in LoRAConfig's words.

        Raises:
            AnalysisError: they have not; every problem is listed.
            TargetError: a target names nothing in the model.
        """
        model, tuned = unwrapped(model), unwrapped(tuned)
        self._before, self._after = dict(base_modules(model)), dict(base_modules(tuned))
        self._parameters = [dict(base_parameters(each)) for each in (model, tuned)]
        self.plan = plan(model, LoRAConfig(rank=1, targets=targets))
        problems = list(self._problems())
        if problems:
            raise AnalysisError.listing("the fine-tuned model is not one of this base", problems)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layers and slices that are compared."""
        return self.plan.sites

    def changes(self) -> Iterator[Change]:
        """Every weight, and what fine-tuning added to it."""
        for site in self.sites:
            weight = matrix_of(self._before[site.path], site)
            after = matrix_of(self._after[site.path], site)
            delta = DenseDelta(after.double() - weight.double())
            yield Change(site.name, delta, weight, min(weight.shape))

    def outside(self) -> dict[str, float]:
        """‖ΔW‖ of each parameter that differs and belongs to no compared layer, by its name.

        A fused layer of which only slices are compared counts with all that differs in the others.
        """
        within: dict[str, float] = {}
        for change, site in zip(self.changes(), self.sites, strict=True):
            name = f"{site.path}.weight"
            within[name] = within.get(name, 0.0) + change.delta.norm() ** 2
        before, after = self._parameters
        found = {}
        for name in before.keys() & after.keys():
            if before[name].shape != after[name].shape:
                continue
            whole = torch.dist(before[name].detach().double(), after[name].detach().double()).item()
            rest = whole**2 - within.get(name, 0.0)
            if rest > whole**2 * 1e-9:
                found[name] = rest**0.5
        return dict(sorted(found.items()))

    def _problems(self) -> Iterator[str]:
        before, after = self._parameters
        for path in dict.fromkeys(site.path for site in self.sites):
            name = f"{path}.weight"
            if name not in before or before[name].is_meta:
                yield f"{name}  is not in memory in the base"
            elif name not in after or after[name].is_meta:
                yield f"{name}  is not in the fine-tuned model"
            elif before[name].shape != after[name].shape:
                shapes = [tuple(each[name].shape) for each in (before, after)]
                yield f"{name}  is {shapes[0]} in the base, {shapes[1]} in the fine-tuned model"
