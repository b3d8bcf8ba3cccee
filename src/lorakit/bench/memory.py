"""The memory of this process: on the GPU where there is one, else the resident set (Linux)."""

from pathlib import Path

import torch


def used_bytes() -> int | None:
    """The memory in use now, on the GPU or resident; None where neither is known."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def most_bytes() -> int | None:
    """The peak of `used_bytes` since `forget_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_bytes()


def forget_peak() -> None:
    """Reset the peak to what is in use now, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # 5 resets the largest resident set: proc(5), clear_refs.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


def peak_bytes() -> int | None:
    """The largest resident set of this process so far; None off Linux.

    Not that of getrusage, which a child inherits from the process that started it.
    """
    return _status("VmHWM")


def resident_bytes(process: int) -> int | None:
    """The resident set of a process by its number; None off Linux."""
    return _status("VmRSS", str(process))


def _status(entry: str, process: str = "self") -> int | None:
    """An entry of /proc/PROCESS/status, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{entry}:")]
    return int(found[0]) * 1024 if found else None
