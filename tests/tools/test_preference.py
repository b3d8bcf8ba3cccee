"""The losses of preferences are those of TRL's trainers, with the same A and B in PEFT."""

import json
from pathlib import Path

import pytest

from tools.environments import run

pytestmark = pytest.mark.thorough


def test_losses_are_those_of_trl(tiny_llama, tmp_path):
    program = Path(__file__).parent / "preference.py"
    told = run("trl", program, tiny_llama, tmp_path, cwd=tmp_path)
    (line,) = [each for each in told.splitlines() if each.startswith("{")]
    found = json.loads(line)
    forms, layouts = ("cpo", "dpo", "ipo", "orpo", "simpo"), ("conversations", "texts")
    assert sorted(found) == [f"{form}, {layout}" for form in forms for layout in layouts]
    for name, (ours, theirs) in found.items():
        assert ours == pytest.approx(theirs, abs=1e-6), name
