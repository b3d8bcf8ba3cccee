"""Which configurations of a Triton kernel are measured, and for which calls.

A call that is over before a GPU is busy says nothing about a configuration: such calls, a trial of
a few tokens among them, use the first one and are not measured. What was measured is kept in
Triton's folder on disk. That spares the next process the time, and since sums run in another order
in another configuration, a resumed run needs the choice of the first to end in the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
from torch import Tensor

_MANY = 2**22  # Elements: some ten microseconds of a GPU's memory, more than a launch takes.


def is_many(x: Tensor) -> bool:
    """Whether a call that reads this is worth measuring: a kernel's argument MANY."""
    return x.numel() >= _MANY


def autotuned(
    configs: Sequence[triton.Config],
    *,
    key: Sequence[str],
    overwrites: Sequence[str] = (),
    prune: Callable[..., list[triton.Config]] | None = None,
) -> Any:
    """A decorator that lets a kernel find its configuration, once for each key.

    Args:
        configs: what is tried. In the interpreter, which cannot measure, the first alone.
        key: the kernel's arguments that another choice may hang on, beside the precisions and MANY.
        overwrites: arguments that the kernel may write over while it needs what they had been;
            they get that back before each further run.
        prune: as Triton's `early_config_prune`, for all calls. None: the first configuration where
            MANY is false, and all where it is true.
    """
    return triton.autotune(
        list(configs[:1] if triton.knobs.runtime.interpret else configs),
        key=[*key, "MANY"],
        prune_configs_by={"early_config_prune": prune or _all_of_many},
        restore_value=list(overwrites),
        do_bench=_measure,
        cache_results=True,
    )


def _all_of_many(
    configs: list[triton.Config], arguments: Mapping[str, Any], **others: Any
) -> list[triton.Config]:
    return configs if others["MANY"] else configs[:1]


def _measure(call: Callable[[], object], quantiles: Sequence[float]) -> Any:
    # A fifth of Triton's own times, in milliseconds: training waits for it.
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)
