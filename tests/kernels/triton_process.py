"""Runs checks of Triton kernels in a process of their own, where Triton interprets or compiles.

The interpreter is chosen when Triton is imported, which other tests do too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device of compute capability 8")


def run_checks(file, **environment):
    """Run a file of this folder as tests."""
    # Shapes are checked in the kernels' modules alone: for all modules it takes ten seconds.
    options = "--import-mode=importlib --jaxtyping-packages=lorakit.kernels,beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"addopts={options}"]
    found = subprocess.run(
        [*command, str(Path(__file__).with_name(file))],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert " passed" in found.stdout
