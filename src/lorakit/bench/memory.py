"""The memory of this process: of the GPU where there is one, else the resident set (Linux)."""

from pathlib import Path

import torch


def used_bytes() -> int | None:
    """Return what is held now: on the GPU, or resident; None where neither is told."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def most_bytes() -> int | None:
    """The most that was held since `forget_peak`, as `used_bytes` counts."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def forget_peak() -> None:
    """Let the peak begin anew at what is held now, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # 5 resets the largest resident set: proc(5), clear_refs.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_bytes() -> int | None:
    """The largest resident set of this process so far; None where Linux does not tell.

    Not getrusage's, which a child inherits from the process that started it.
    """
    return _status("VmHWM")


def _status(entry: str) -> int | None:
    """An entry of Linux's account of this process, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 if found else None
