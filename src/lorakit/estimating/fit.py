"""Settings whose run fits into a budget of memory, and what each of them costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.config.estimate import EstimateConfig
from lorakit.errors import ConfigError, LorakitError
from lorakit.estimating.estimate import Estimate

MEMORY = ("fast", "balanced", "low")
PRECISIONS: Sequence[Mapping[str, Any]] = (
    {},
    {"dtype": "bfloat16"},
    {"quantize": "8bit"},
    {"quantize": "4bit"},
)
"""Settings that hold the base in fewer bits, those that change least first."""
COSTS = {
    "balanced": "part of the activations is computed again",
    "low": "blocks are computed again",
    "accumulate": "more passes of fewer rows; the same gradients",
    "dtype": "the base is rounded to bfloat16",
    "8bit": "the base is rounded to 8 bits",
    "4bit": "the base is rounded to 4 bits",
}


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """Settings with which a run fits."""

    changes: Mapping[str, Any]
    """The settings that differ from those that were given."""
    estimate: Estimate
    times_flops: float
    """FLOPs of a step over those of the settings that were given."""
    costs: tuple[str, ...]
    """What is paid for the memory, in words."""

    def to_json(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "changes": dict(self.changes),
            "training_bytes": self.estimate.training_bytes,
            "seconds": self.estimate.seconds,
            "times_flops": self.times_flops,
            "costs": list(self.costs),
        }


def fitting(
    config: EstimateConfig, budget_bytes: int, *, estimate: Callable[[EstimateConfig], Estimate]
) -> tuple[Fitting, ...]:
    """Settings with which a run fits, those that change least first.

    Each memory mode is tried with the most rows a pass that fit; if none does, the base is held in
    fewer bits. An optimizer step has the same rows in all of them.

    Args:
        config: the settings that were given.
        budget_bytes: the memory of a device.
        estimate: what estimates settings.

    Raises:
        ConfigError: nothing fits; the message has the least that was found.
    """
    search = _Search(config, budget_bytes, estimate)
    for changes in _precisions(config):
        modes = MEMORY[MEMORY.index(config.memory) :]
        tried = [search.most_rows({**changes, **_mode(config, mode)}) for mode in modes]
        found = [each for each in tried if each is not None]
        if found:
            return tuple(found)
    least_bytes, changes = search.least
    raise ConfigError(
        f"nothing fits into {budget_bytes / 1e9:.3g} GB: the least is {least_bytes / 1e9:.3g} GB, "
        f"with {_words(changes)}; give shorter rows (data.max_length), a smaller model, or several "
        "processes that divide the base (shard: base)"
    )


def _precisions(config: EstimateConfig) -> Iterator[Mapping[str, Any]]:
    """Yield what could be held in fewer bits, each alone."""
    for changes in PRECISIONS:
        in_bits = "quantize" in changes
        is_held = config.quantize is not None or config.compile
        is_narrow = config.dtype not in ("float32", "auto")
        if not (is_held if in_bits else changes and is_narrow):
            yield changes


def _mode(config: EstimateConfig, mode: str) -> Mapping[str, Any]:
    return {} if mode == config.memory else {"memory": mode}


class _Search:
    """The search for settings of one run."""

    def __init__(
        self,
        config: EstimateConfig,
        budget_bytes: int,
        estimate: Callable[[EstimateConfig], Estimate],
    ) -> None:
        self._config, self._budget, self._estimate = config, budget_bytes, estimate
        self._given = estimate(config)
        self.least: tuple[int, Mapping[str, Any]] = (self._given.training_bytes, {})
        """The least memory so far, and what it was found with."""

    def most_rows(self, changes: Mapping[str, Any]) -> Fitting | None:
        """The settings with the most rows a pass that fit; None: not even one row does."""
        rows = self._config.batch_size
        while rows >= self._config.processes:
            passes = self._config.batch_size // rows
            fewer = {"batch_size": rows, "accumulate": passes * self._config.accumulate}
            chosen = {**changes, **(fewer if passes > 1 else {})}
            try:
                found = self._estimate(self._config.model_copy(update=chosen))
            except LorakitError:
                # Such as weights in few bits that are to be trained.
                return None
            self.least = min(self.least, (found.training_bytes, chosen), key=lambda each: each[0])
            if found.training_bytes <= self._budget:
                return self._fitting(chosen, found)
            if rows % 2:
                return None
            rows //= 2
        return None

    def _fitting(self, changes: Mapping[str, Any], found: Estimate) -> Fitting:
        words = {*changes, *map(str, changes.values())}
        return Fitting(
            changes=changes,
            estimate=found,
            times_flops=found.flops / self._given.flops,
            costs=tuple(meaning for word, meaning in COSTS.items() if word in words),
        )


def _words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in changes.items()) or "what was given"
