"""The examples with other people's trainers: the losses are PEFT's under the same trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.make import PACKAGES, environment_of

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
EXAMPLES = {
    "transformers": None,
    "accelerate": None,
    "lightning": "lightning",
    "trl_sft": "trl",
    "trl_grpo": "trl",
}
"""The tool whose environment each example needs."""

pytestmark = pytest.mark.thorough


def python_of(tool):
    """The interpreter of a tool's environment; without a tool, this one."""
    assert tool is None or tool in PACKAGES
    folder = environment_of(tool) if tool else None
    if folder is not None and not folder.is_dir():
        pytest.skip(f"needs an environment: python tests/tools/make.py {tool}")
    return folder / "bin" / "python" if folder else Path(sys.executable)


def run(tool, *words, **more):
    """What a program printed in the environment of a tool."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(python_of(tool)), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=environment,
        **more,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_each_example_has_a_test():
    files = (ROOT / "examples" / "trainers").glob("with_*.py")
    assert sorted(file.stem.removeprefix("with_") for file in files) == sorted(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_losses_are_those_of_peft(example, tiny_llama, tmp_path):
    program = Path(__file__).parent / "compare.py"
    told = run(EXAMPLES[example], program, example, tiny_llama, tmp_path, cwd=tmp_path)
    found = json.loads(told.splitlines()[-1])
    for name, ours in found["lorakit"].items():
        assert ours == pytest.approx(found["peft"][name], abs=1e-5), name
    assert len(set(found["lorakit"]["loss"])) > 5
