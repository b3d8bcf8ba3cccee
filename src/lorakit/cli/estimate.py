"""The verb estimate: memory, disk, FLOPs and time of a run and a server, before either starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorakit.cli.columns import columns
from lorakit.cli.verbs import Result
from lorakit.config.estimate import EstimateConfig
from lorakit.estimating.estimate import Estimate, Estimator
from lorakit.estimating.fit import Fitting, fitting


def run(settings: EstimateConfig) -> Result:
    """Estimate the run as it is, or with fit find settings whose run fits."""
    estimator = Estimator()
    if settings.fit is not None:
        found = fitting(settings, settings.fit, estimate=estimator)
        lines = [*_table(found, settings.fit), "", *_lines(found[0].estimate)]
        data = {
            "fit_bytes": settings.fit,
            "fitting": [each.to_json() for each in found],
            "estimate": found[0].estimate.to_json(),
        }
        return Result(text="\n".join(lines), data=data)
    made = estimator(settings)
    return Result(text="\n".join(_lines(made)), data=made.to_json())


def size(size_bytes: int) -> str:
    """A size with three digits, in the unit that suits it."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= of:
            return f"{size_bytes / of:.3g} {unit}"
    return f"{size_bytes / 1e3:.3g} KB"


def _lines(found: Estimate) -> Iterator[str]:
    of = f"one of {found.processes} processes" if found.processes > 1 else "the process"
    yield f"{found.parameters:,} parameters, {found.trained:,} values are trained"
    yield f"memory of training, of {of}, on {found.device}:"
    yield from _parts(found.training)
    if found.serving:
        yield f"memory of a server, on {found.device}:"
        yield from _parts(found.serving)
    yield f"on disk: adapter {size(found.adapter_bytes)}, checkpoint {size(found.checkpoint_bytes)}"
    time = "" if found.seconds is None else f", {found.seconds:.3g} s"
    yield f"a step: {found.tokens:,} tokens, {found.flops / 1e12:.3g}·10¹² FLOPs{time}"
    yield from (f"note: {each}" for each in found.notes)


def _parts(parts: Mapping[str, int]) -> list[str]:
    rows = [(f"  {name}", size(value)) for name, value in parts.items() if value]
    return columns([*rows, ("  together", size(sum(parts.values())))])


def _table(found: tuple[Fitting, ...], budget: int) -> Iterator[str]:
    yield f"settings that fit into {size(budget)}:"
    yield from columns(
        [
            (
                "  " + (", ".join(f"{k}: {v}" for k, v in each.changes.items()) or "as given"),
                size(each.estimate.training_bytes),
                f"{each.times_flops:.2f}x FLOPs",
                "" if each.estimate.seconds is None else f"{each.estimate.seconds:.3g} s a step",
                "; ".join(each.costs),
            )
            for each in found
        ]
    )
