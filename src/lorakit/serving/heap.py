"""Memory that the threads of a server free, and use again."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8
"""The number of glibc's mallopt for this, from its malloc.h."""
FEW = 2


def share_heap() -> bool:
    """Have the threads of this process take their memory from few heaps.

    glibc gives each thread a heap, up to eight for each core. What is freed in one of them is not
    used by the threads of another, so that a server whose loads and answers are done by ever other
    threads grows until all of them are as large as they get.

    Returns:
        Whether it could be said: elsewhere than in glibc there is nothing of that kind.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_ARENA_MAX, FEW))


def give_back() -> bool:
    """Have the system take back memory that was freed between what is still in use.

    An adapter is hundreds of small tensors, and what another one leaves is seldom in one piece. It
    takes some milliseconds, beside the hundreds of a load.

    Returns:
        Whether any was given back; elsewhere than in glibc there is nothing of that kind.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
