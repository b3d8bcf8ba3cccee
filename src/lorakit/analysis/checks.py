"""What of an adapter has a ΔW to look into, and whether two adapters can be put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.site import Site
from lorakit.adapter.tensor_files import value_problems
from lorakit.errors import AnalysisError

WITHOUT_DELTA = {
    "prefix": "virtual tokens are inputs of the blocks and change no weight",
    "adapter": "bottlenecks are layers of their own and change no weight",
    "bitfit": "it trains vectors, which have no singular values",
    "full": "it holds whole weights, and their change needs the base: give the model",
    "top-k": "it holds whole weights, and their change needs the base: give the model",
}
"""Why a method has no ΔW = scale·B·A, by the beginning of its name."""
BIAS_OF_B = "lora_bias: B has a bias, which is no part of ΔW"
EXPERTS = "experts: each has a ΔW of its own in one tensor, which is not looked into"
DORA = "DoRA's ΔW = m/‖W + scale·B·A‖·(W + scale·B·A) − W needs the base: give the model"


def left_out(adapter: Adapter, *, with_base: bool = False) -> tuple[str, ...]:
    """What of an adapter an analysis of its ΔW does not show, and why, in words.

    Args:
        adapter: what is analysed.
        with_base: whether the base is given, against which whole weights can be compared.

    Examples:
        >>> lk.analysis.left_out(lk.Adapter.load("out/places"))
        ()
    """
    return tuple(_left_out(adapter, with_base))


def _left_out(adapter: Adapter, with_base: bool) -> Iterator[str]:
    for config in adapter.configs:
        reason = _reason(config.method)
        if reason is not None and not (with_base and config.method in ("full", "top-k")):
            yield f"{config.method}: {reason}"
    if uses_dora(adapter) and not with_base:
        yield f"lora: {DORA}"
    if _has_experts(adapter):
        yield EXPERTS
    if adapter.lora is not None and adapter.lora.trainable_token_indices:
        yield f"rows of tokens in {', '.join(adapter.lora.tokens_by_module)}: whole vectors"
    if adapter.copied_modules and adapter.sites and not with_base:
        yield f"saved in full: {', '.join(adapter.copied_modules)}: their change needs the base"


def has_delta(adapter: Adapter, *, with_base: bool = False) -> bool:
    """Whether an adapter has any ΔW to look into, with its base at hand or without."""
    if _has_experts(adapter):
        return False
    if adapter.sites and (with_base or not uses_dora(adapter)):
        return True
    return with_base and any(config.method in ("full", "top-k") for config in adapter.configs)


def _reason(method: str) -> str | None:
    return next((why for start, why in WITHOUT_DELTA.items() if method.startswith(start)), None)


def _has_experts(adapter: Adapter) -> bool:
    return any(site.is_of_experts for site in adapter.sites)


def uses_dora(adapter: Adapter) -> bool:
    """Whether the rows of an adapter's weights have magnitudes, so that ΔW is no product B·A."""
    return any(f"{site.name}.lora_magnitude" in adapter.tensors for site in adapter.sites)


def biases_of_b(adapters: Sequence[Adapter]) -> list[str]:
    """A line for each adapter whose B has a bias, which a new ΔW would leave behind."""
    numbered = enumerate(adapters, start=1)
    return [
        f"adapter {n}  {BIAS_OF_B}" for n, each in numbered if each.lora and each.lora.lora_bias
    ]


def of_changed_bases(adapters: Sequence[Adapter]) -> list[str]:
    """A line for each adapter whose base LoftQ has made by its layers and ranks."""
    return [
        f"adapter {n}  LoftQ ({each.loftq}) changed its base by the layers and ranks that it has, "
        "and a new adapter has others: merge it"
        for n, each in enumerate(adapters, start=1)
        if each.loftq is not None
    ]


def check_low_rank(adapters: Sequence[Adapter], *, what: str, dora: bool = False) -> None:
    """Make sure that each adapter has a ΔW = scale·B·A in finite numbers.

    Args:
        adapters: those to be analysed.
        what: what is asked of them, for the message.
        dora: whether A and B alone are looked at, which DoRA has too.

    Raises:
        AnalysisError: every reason why one of them has none.
    """
    problems = low_rank_problems(adapters, dora=dora)
    if problems:
        raise AnalysisError.listing(f"{what} needs ΔW = scale·B·A", problems)


def low_rank_problems(adapters: Sequence[Adapter], *, dora: bool = False) -> list[str]:
    """A line for each reason why one of some adapters has no ΔW = scale·B·A in finite numbers."""
    problems = []
    for number, adapter in enumerate(adapters, start=1):
        who = f"adapter {number}  " if len(adapters) > 1 else ""
        problems += [f"{who}{problem}" for problem in _problems(adapter, dora)]
    return problems


def _problems(adapter: Adapter, dora: bool) -> list[str]:
    if not adapter.sites:
        return list(left_out(adapter)) or [f"{adapter.method}: it has no low-rank update"]
    if uses_dora(adapter) and not dora:
        return [DORA]
    if _has_experts(adapter):
        return [EXPERTS]
    return not_finite(adapter)


def not_finite(adapter: Adapter) -> list[str]:
    """A line for each tensor of an adapter's sites that holds NaN or infinity."""
    ends = ("a", "b", "bias", "magnitude")
    names = [f"{site.name}.lora_{end}" for site in adapter.sites for end in ends]
    return value_problems(
        {name: adapter.tensors[name] for name in names if name in adapter.tensors}
    )


def check_same_base(adapters: Sequence[Adapter], *, allow_other_base: bool = False) -> None:
    """Make sure that adapters were trained on one base, as far as their files tell.

    Raises:
        AnalysisError: with what differs between their bases.
    """
    if allow_other_base:
        return
    problems = [
        f"adapter {n}: LoftQ changed other layers of its base, or otherwise ({each.loftq}), than "
        f"for adapter 1 ({adapters[0].loftq})"
        for n, each in enumerate(adapters, start=1)
        if each.loftq_forms != adapters[0].loftq_forms
    ]
    known = [(n, each.base) for n, each in enumerate(adapters, start=1) if each.base is not None]
    if known:
        (first, base), *others = known
        problems += [
            f"adapter {number} ({other.name or 'unnamed'}) beside adapter {first} "
            f"({base.name or 'unnamed'}): {difference}"
            for number, other in others
            if (difference := base.difference(other)) is not None
        ]
    if problems:
        raise AnalysisError.listing(
            "the adapters were trained on different bases, so that their ΔW have no common meaning "
            "(allow_other_base accepts that)",
            problems,
        )


def common_sites(first: Adapter, second: Adapter) -> tuple[tuple[Site, Site], ...]:
    """The sites that two adapters share, in the first one's order.

    Raises:
        AnalysisError: there are none, or they have other shapes.
    """
    theirs = {site.name: site for site in second.sites}
    pairs = tuple((site, theirs[site.name]) for site in first.sites if site.name in theirs)
    if not pairs:
        raise AnalysisError(
            "the two adapters change no layer in common: the first has "
            f"{_some(first)}, the second {_some(second)}"
        )
    problems = [
        f"{one.name}  {'×'.join(map(str, ours))} in the first, "
        f"{'×'.join(map(str, others))} in the second"
        for one, other in pairs
        if (ours := shape_of(first, one)) != (others := shape_of(second, other))
    ]
    if problems:
        raise AnalysisError.listing("the adapters are of different bases: shapes differ", problems)
    return pairs


def shape_of(adapter: Adapter, site: Site) -> tuple[int, int]:
    """(d_out, d_in) of the matrix that a site changes."""
    a, b = (adapter.tensors[f"{site.name}.lora_{end}"] for end in "ab")
    return b.shape[0], a[0].numel()


def _some(adapter: Adapter) -> str:
    names = [site.name for site in adapter.sites]
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
