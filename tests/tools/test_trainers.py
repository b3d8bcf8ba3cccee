"""The examples with other people's trainers: the losses are PEFT's under the same trainer."""

import json
from pathlib import Path

import pytest

from tools.environments import ROOT, run

EXAMPLES = {
    "transformers": None,
    "accelerate": None,
    "lightning": "lightning",
    "trl_sft": "trl",
    "trl_dpo": "trl",
    "trl_grpo": "trl",
}
"""The tool whose environment each example needs."""

pytestmark = pytest.mark.thorough


def test_each_example_has_a_test():
    files = (ROOT / "examples" / "trainers").glob("with_*.py")
    assert sorted(file.stem.removeprefix("with_") for file in files) == sorted(EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_losses_are_those_of_peft(example, tiny_llama, tmp_path):
    program = Path(__file__).parent / "compare.py"
    told = run(EXAMPLES[example], program, example, tiny_llama, tmp_path, cwd=tmp_path)
    (line,) = [each for each in told.splitlines() if each.startswith('{"lorakit"')]
    found = json.loads(line)
    ours = found.pop("lorakit")
    assert sorted(found) == sorted(
        {"peft"} | ({"lorakit train"} if example == "trl_dpo" else set())
    )
    for who, figures in found.items():
        for name, theirs in figures.items():
            assert ours[name] == pytest.approx(theirs, abs=1e-5), (who, name)
    assert len({round(each, 4) for each in ours["loss"]}) > 5
