"""Which kernels compute: the fast ones wherever they can, or plain torch, their reference.

    with use("plain"):
        model(**batch).loss.backward()

The choice holds for the whole process, so that it reaches autograd's threads and those of a sweep.
A fast path asks `fast()` in its forward pass, and its backward pass is the one that goes with it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

KernelChoice = Literal["auto", "plain"]


class _Block:
    def __init__(self, kind: KernelChoice) -> None:
        self.kind = kind


_lock = threading.Lock()
_open: list[_Block] = []
_current: KernelChoice = "auto"


def fast() -> bool:
    """Whether a fast path may be taken."""
    return _current == "auto"


@contextmanager
def use(kind: KernelChoice) -> Iterator[None]:
    """Choose the kernels for the time of a block.

    Of several open blocks the one that was opened last decides, also where threads close theirs in
    another order.

    Args:
        kind: auto: the fast paths wherever they can; plain: plain torch everywhere.
    """
    block = _Block(kind)
    _change(lambda: _open.append(block))
    try:
        yield
    finally:
        _change(lambda: _open.remove(block))


def _change(step: Callable[[], None]) -> None:
    global _current
    with _lock:
        step()
        _current = _open[-1].kind if _open else "auto"
