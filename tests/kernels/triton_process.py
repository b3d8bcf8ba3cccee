"""Runs checks of Triton kernels in processes of their own, where Triton interprets or compiles.

The interpreter is chosen when Triton is imported, which other tests do too.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device of compute capability 8")


INTERPRETED = ("liger_checks.py", "segments_checks.py")


def run_checks(*files, **environment):
    """Run files of this folder as tests, and return the finished process."""
    # Shapes are checked in the kernels' modules alone: for all modules it takes ten seconds.
    options = "--import-mode=importlib --jaxtyping-packages=lorakit.kernels,beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"addopts={options}"]
    return subprocess.run(
        [*command, "-rA", *(str(Path(__file__).with_name(file)) for file in files)],
        cwd=ROOT,
        # Triton 3.9 warns while the first one is not set.
        env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_passed(file, found):
    """Have a file's checks passed, at least one of them and none of them not."""
    lines = [line for line in found.stdout.splitlines() if f"{file}::" in line]
    assert not [line for line in lines if line.startswith(("FAILED", "ERROR"))], found.stdout
    assert [line for line in lines if line.startswith("PASSED")], found.stdout + found.stderr
    assert found.returncode in (0, 1), found.stdout + found.stderr


@functools.cache
def interpreted():
    """Run the checks of all kernels in one interpreter, since starting it is most of the time."""
    return run_checks(*INTERPRETED, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def check_in_the_interpreter(file):
    """Have a file's checks passed where Triton interprets its kernels."""
    assert_passed(file, interpreted())


def check_on_the_device(file):
    """Have a file's checks passed where Triton compiles its kernels."""
    found = run_checks(file, TRITON_INTERPRET="0")
    assert found.returncode == 0, found.stdout + found.stderr
    assert_passed(file, found)
