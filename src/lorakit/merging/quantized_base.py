"""How far a merged model is from the one that was trained, where that had a quantised base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.merging.probe import default_probe, outputs_on
from lorakit.merging.report import MergeReport
from lorakit.models.base import base_modules
from lorakit.models.quantized_weight import float_weight, is_quantized


@dataclass(frozen=True)
class TrainedModel:
    """A quantised base with the adapter that was trained on it, to compare a merged model with."""

    layers: Mapping[str, nn.Module]
    """The quantised layers by path."""
    outputs: Tensor | None
    """The answer to the probe batch, adapter included; None: the model takes no token ids."""

    @staticmethod
    def of(model: nn.Module) -> TrainedModel:
        """The facts about a quantised model with its adapter, which may be changed afterwards."""
        layers = {path: layer for path, layer in base_modules(model) if is_quantized(layer)}
        return TrainedModel(layers, outputs_on(model, default_probe(model)))

    def distances(self, base: nn.Module) -> dict[str, float]:
        """‖W₀ − Q(W₀)‖/‖W₀‖ of each layer of a float base, by the weight's name.

        Args:
            base: the original or the dequantised base, before anything is merged.
        """
        found = {}
        for path, layer in self.layers.items():
            weight = base.get_parameter(f"{path}.weight").detach().double()
            held = float_weight(layer).to(weight)
            # A quantised Conv1D is held as a Linear.
            turned = getattr(layer, "source_cls", nn.Linear) is Conv1D
            held = held.T if turned else held
            found[f"{path}.weight"] = ((weight - held).norm() / weight.norm()).item()
        return found

    def compare(
        self, report: MergeReport, merged: nn.Module, distances: Mapping[str, float]
    ) -> MergeReport:
        """A report with how far the merged model is from this one.

        Args:
            report: of the merge.
            merged: the model, with the adapter merged.
            distances: of the base, from `distances`.
        """
        # ‖W₀ + ΔW − (Q(W₀) + ΔW)‖/‖ΔW‖ is the ratio of two shares of ‖W₀‖.
        weights = tuple(
            replace(w, base_error=distances[w.name] / w.relative_update if w.relative_update else 0)
            if w.name in distances
            else w
            for w in report.weights
        )
        after = outputs_on(merged, default_probe(merged))
        change = None
        if after is not None and self.outputs is not None:
            change = (after - self.outputs).abs().max().item()
        return replace(report, weights=weights, trained_change=change)
