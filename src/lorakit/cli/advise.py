"""Rank advice of inspect: a smaller adapter, scored beside the one that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.adapter import Adapter
from lorakit.analysis.compressing import compress
from lorakit.answering.evaluate import Evaluation, evaluation
from lorakit.cli.columns import columns
from lorakit.cli.spectra import rank_lines
from lorakit.config.answering import EvaluateConfig
from lorakit.config.verbs import InspectConfig

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
"""A base and its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A smaller adapter, and how it compares."""

    before: Adapter
    after: Adapter
    scored: tuple[Evaluation, Evaluation] | None
    """The scores of both on the same rows; None: no rows were given."""

    def lines(self) -> Iterator[str]:
        """The advice as text."""
        told = self.after.card["compressed"]
        yield (
            f"advice: {told['energy']:.0%} of the energy of each ΔW needs these ranks "
            f"(relative error {told['relative_error']:.3f})"
        )
        yield from rank_lines(self.before, self.after)
        share = self.after.parameters / self.before.parameters
        yield (
            f"parameters: {self.before.parameters:,} → {self.after.parameters:,} ({share:.0%}), "
            f"size: {self.before.size_bytes / 1e6:.1f} → {self.after.size_bytes / 1e6:.1f} MB"
        )
        if self.scored is None:
            yield "not scored: give --data.validation to see what the smaller one loses"
            return
        first, second = self.scored
        yield f"{first.rows} rows of {first.source}"
        yield from first.notes
        rows = [["score", "before", "after"]]
        rows += [[n, f"{v:.4f}", f"{second.scores[n]:.4f}"] for n, v in first.scores.items()]
        yield from columns(rows)

    def to_json(self) -> dict[str, Any]:
        """The advice as plain values."""
        return {
            **self.after.card["compressed"],
            "ranks": {site.name: site.rank for site in self.after.sites},
            "parameters": [self.before.parameters, self.after.parameters],
            "size_bytes": [self.before.size_bytes, self.after.size_bytes],
        }


def advise(settings: InspectConfig, adapter: Adapter, loaded: Loaded | None) -> Advice:
    """Compress an adapter, score both if there are rows, and write the smaller one if asked.

    Args:
        settings: of inspect.
        adapter: the one to be made smaller.
        loaded: the base, where there are rows to score.

    Raises:
        LorakitError: the adapter has no ΔW = scale·B·A, the rows cannot be used, or the folder
            cannot be written.
    """
    smaller = compress(adapter, energy=settings.energy)
    scored = None
    if loaded is not None and settings.data.validation is not None:
        config = EvaluateConfig(
            data=settings.data,
            metrics=settings.metrics,
            batch_size=settings.batch_size,
            allow_other_base=settings.allow_other_base,
        )
        first, second = (
            evaluation(config, each, *loaded, progress=True) for each in (adapter, smaller)
        )
        scored = first, second
        told = {
            "scores": {"before": first.scores, "after": second.scores},
            "rows": first.rows,
            "source": first.source,
        }
        compressed = {**smaller.card["compressed"], **told}
        smaller = replace(smaller, card={**smaller.card, "compressed": compressed})
    if settings.out is not None:
        smaller.save(settings.out)
    return Advice(before=adapter, after=smaller, scored=scored)
