"""Work in fresh processes, whose memory is what the work takes.

glibc keeps what was freed in holes between what is not. `MAPPED` has a process map each larger
piece of memory by itself, which goes back to the system at once.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from lorakit.bench.memory import used_bytes
from lorakit.errors import TrainingError

T = TypeVar("T")

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""The environment in which glibc maps pieces of so many bytes by themselves."""


def in_fresh_processes(
    work: Callable[..., T], arguments: Sequence[Sequence[Any]], variables: Mapping[str, str]
) -> list[T]:
    """The results of some work, each in a process of its own, all at once.

    Args:
        work: a function at the top of a module.
        arguments: those of each process.
        variables: of the environment in which they begin, beside those that are there.
    """
    with environment(variables):
        afresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=len(arguments), mp_context=afresh) as processes:
            started = [processes.submit(work, *each) for each in arguments]
            return [each.result() for each in started]


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give processes that begin inside a block more environment variables."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def settled_bytes() -> int:
    """The memory of this process, after what is free was given back to the system.

    Raises:
        TrainingError: the system does not tell.
    """
    gc.collect()
    # Else what importing has freed would be used again, and not be seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    found = used_bytes()
    if found is None:
        raise TrainingError("this system does not tell how much memory a process has (Linux does)")
    return found
