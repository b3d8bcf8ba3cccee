"""The environment of a measurement, which every result has: commit, versions, hardware."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from lorakit.upstream.versions import installed_version

LIBRARIES = ("lorakit", "torch", "transformers", "peft", "sacrebleu", "scikit-learn", "scipy")
"""Libraries whose versions a result has."""
SOURCE = Path(__file__)
"""A file of the sources that are measured."""
RESULTS = (":(top,exclude)benchmarks/results", ":(top,exclude)paper/results")
"""All but the folders of results, in the words of git."""
DIRTY = "-dirty"
"""The end of a commit whose files were changed."""


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, as they are before the work starts.

    The commit ends with "-dirty" where files were changed, and is None outside of a checkout.
    """
    commit = _commit(SOURCE)
    return {
        "commit": f"{commit}{DIRTY}" if commit and uncommitted(SOURCE) else commit,
        "versions": {
            "python": platform.python_version(),
            **{n: installed_version(n) for n in LIBRARIES},
        },
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def uncommitted(source: Path = SOURCE) -> list[str]:
    """The tracked files of a checkout that differ from its commit, by path; [] outside of one.

    Results do not count: measuring one benchmark after the other changes them, and no time
    depends on them.

    Args:
        source: a file or folder of the sources that are measured.
    """
    if _commit(source) is None:
        return []
    changed = _git(source, "diff", "--name-only", "HEAD", "--", ":/", *RESULTS) or ""
    return changed.splitlines()


def _commit(source: Path) -> str | None:
    """The commit of sources; None where no checkout tracks them, as of an installed package."""
    if not _git(source, "ls-files", "--", str(source.resolve())):
        return None
    return _git(source, "rev-parse", "--short=12", "HEAD")


def _git(source: Path, *words: str) -> str | None:
    """The output of git in the folder of a file; None where there is no git, or no checkout."""
    folder = source if source.is_dir() else source.parent
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """The processor's name, and what it has for bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([name, *special])
