"""What a merge did to the weights, and what rounding took of the update."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_BLOCK = re.compile(r"\.\d+\.")
WARN_ABOVE = 0.10
"""Share of ΔW lost to rounding above which a merge is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class MergedWeight:
    """The change of one parameter by a merge, and what rounding took of it."""

    name: str
    """The base's own parameter name."""
    relative_update: float
    """‖ΔW‖/‖W‖, Frobenius norms."""
    rounding_error: float
    """‖W_merged − (W + ΔW)‖/‖ΔW‖: the share of the update that rounding destroyed."""
    base_error: float | None = None
    """‖(W + ΔW) − (Q(W) + ΔW)‖/‖ΔW‖: how far the base is from the quantised one that the adapter
    was trained on, in units of the update; None: that was not quantised, or nobody compared."""


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What a merge did, weight by weight.

    Examples:
        >>> plan = lk.attach(model, "out/places")
        >>> report = lk.merge(model)
        >>> report.adapter, len(report.weights)
        ('default', 60)
        >>> report.rounding_error < 1e-3  # in float32
        True
    """

    adapter: str
    weights: tuple[MergedWeight, ...]
    logit_change: float | None
    """Largest change of an output on the probe batch against the unmerged model; None: no probe."""
    trained_change: float | None = None
    """The same against the model that was trained, on its quantised base; None as `base_error`."""

    @property
    def worst(self) -> MergedWeight | None:
        """The weight that lost the largest share of its update."""
        return max(self.weights, key=lambda w: w.rounding_error, default=None)

    @property
    def rounding_error(self) -> float:
        """The largest share of its update that a weight lost; 0 where nothing was measured."""
        return 0.0 if self.worst is None else self.worst.rounding_error

    @property
    def warning(self) -> str | None:
        """A warning where rounding destroyed much of the update, else None."""
        worst = self.worst
        if worst is None or worst.rounding_error <= WARN_ABOVE:
            return None
        return (
            f"rounding destroyed {worst.rounding_error:.0%} of the update of {worst.name}: "
            "merge into float32, or keep the adapter unmerged"
        )

    def __repr__(self) -> str:
        """One line: the adapter, how many weights, and the most that rounding took of one."""
        worst = self.worst
        lost = "" if worst is None else f", at most {100 * worst.rounding_error:.2g}% of ΔW lost"
        warned = "" if self.warning is None else ", with a warning"
        return f"MergeReport({self.adapter!r} in {len(self.weights)} weights{lost}{warned})"

    def __str__(self) -> str:
        """The report as a table: the largest figures of weights alike in all blocks, in a line."""
        groups: dict[str, list[MergedWeight]] = {}
        for weight in self.weights:
            groups.setdefault(_BLOCK.sub(".*.", weight.name, count=1), []).append(weight)
        width = max(map(len, groups), default=6)
        compared = any(w.base_error is not None for w in self.weights)
        last = "  |W-Q(W)|/|dW|" if compared else ""
        lines = [f"{'at most, of':<{width}}  weights  |dW|/|W|  lost to rounding{last}"]
        lines += [f"{name:<{width}}  {_largest(alike)}" for name, alike in groups.items()]
        if self.logit_change is not None:
            lines.append(f"largest change of an output on the probe batch: {self.logit_change:.3g}")
        if self.trained_change is not None:
            lines.append(
                "largest change against the model that was trained, on its quantised base Q(W): "
                f"{self.trained_change:.3g}"
            )
        return "\n".join([*lines, *([f"warning: {self.warning}"] if self.warning else [])])

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "adapter": self.adapter,
            "logit_change": self.logit_change,
            "trained_change": self.trained_change,
            "warning": self.warning,
            "weights": [vars(w) for w in self.weights],
        }


def _largest(weights: Sequence[MergedWeight]) -> str:
    """The number of weights, and the largest of each of their figures, as columns."""
    update = max(w.relative_update for w in weights)
    lost = max(w.rounding_error for w in weights)
    errors = [w.base_error for w in weights if w.base_error is not None]
    text = f"{len(weights):7}  {update:8.2%}  {f'{100 * lost:.2g}%':>16}"
    return f"{text}  {max(errors):13.4g}" if errors else text
