"""What every result says of where it was measured: commit, versions, hardware."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("lorakit", "torch", "transformers", "peft", "sacrebleu")
"""Whose versions are told."""


def environment() -> dict[str, Any]:
    """Return commit, versions and hardware: to be asked before the work starts."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in LIBRARIES}},
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    """The commit of these sources; None where they are not in a git checkout."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([name, *special])
