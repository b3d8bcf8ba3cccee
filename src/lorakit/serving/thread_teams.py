"""Torch's threads on a CPU, which the engine's thread shall have alone.

Each thread that computes with torch gets a team of threads from OpenMP, which waits for its next
piece of work until that thread ends. While all teams together have more threads than there are
cores, GNU's OpenMP puts waiting ones to sleep at once, where it else lets them look for work for
some milliseconds. A decode step has about a thousand pieces, and waking somebody for each of them
makes it half as slow again. So whatever computes beside the engine does it in a thread that ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def without_team(work: Callable[[], Result]) -> Result:
    """Do work in a thread that ends, and with it its team.

    Args:
        work: computes on the CPU; it has no gradient mode, route or other state of this thread.

    Raises:
        BaseException: what the work raises.
    """
    found: list[Result] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    # Who interrupts the process does not wait for it.
    thread = threading.Thread(target=run, name="lorakit-passing", daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
