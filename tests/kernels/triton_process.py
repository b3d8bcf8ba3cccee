"""Runs checks of Triton kernels in processes of their own, where Triton interprets or compiles.

The interpreter is chosen when Triton is imported, which other tests do too.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device of compute capability 8")


def run_checks(*files, chosen="", warnings=(), **environment):
    """Run files of this folder as tests, those that a marker expression chooses.

    `warnings` are values of pytest's option -W.
    """
    # Shapes are checked in the kernels' modules alone: for all modules it takes ten seconds.
    options = "--import-mode=importlib --jaxtyping-packages=lorakit.kernels,beartype.beartype"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", f"addopts={options}"]
    found = subprocess.run(
        [
            *command,
            *(f"-W{each}" for each in warnings),
            "-rA",
            "-m",
            chosen,
            *(str(Path(__file__).with_name(file)) for file in files),
        ],
        cwd=ROOT,
        # Triton 3.9 warns while the first one is not set.
        env=os.environ | {"TRITON_DEFAULT_FP_FUSION": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    for file in files:
        assert re.search(f"^PASSED .*{file}::", found.stdout, re.MULTILINE), found.stdout
