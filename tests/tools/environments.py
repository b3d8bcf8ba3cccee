"""Programs run in the environments of tools that others wrote."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.make import PACKAGES, environment_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


def python_of(tool):
    """The interpreter that has a tool: this one, or that of its environment."""
    assert tool is None or tool in PACKAGES
    if tool is None or importlib.util.find_spec(tool):
        return Path(sys.executable)
    folder = environment_of(tool)
    if not folder.is_dir():
        pytest.skip(f"needs an environment: python tests/tools/make.py {tool}")
    return folder / "bin" / "python"


def run(tool, *words, code=0, **more):
    """What a program printed, on stdout and then on stderr, in the environment of a tool."""
    paths = [str(ROOT / "src"), *map(str, more.pop("paths", ()))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment |= {name: str(value) for name, value in more.pop("variables", {}).items()}
    done = subprocess.run(
        [str(python_of(tool)), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        **more,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


# Ray gives its workers what other processes leave; on a busy machine that is nothing.
OF_RAY = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}


def lorakit_on_ray(*words, **more):
    """What the command line printed in Ray's environment."""
    return run("ray", "-m", "lorakit", *words, variables=OF_RAY | {"OMP_NUM_THREADS": 1}, **more)
