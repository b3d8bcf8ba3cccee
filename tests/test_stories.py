"""The stories in examples/ run to their end, in a short form, and draw their pictures."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


# The tiny model has 32 positions, so that prompts are cut and answers have little room.
@pytest.mark.filterwarnings("ignore:.*(cut|less room):UserWarning")
@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("first_adapter", {}),
        pytest.param("many_adapters", {"points": 2}, marks=pytest.mark.thorough),
    ],
)
@pytest.mark.thorough
def test_a_story_runs_and_draws_its_picture(name, short, tiny_llama, tmp_path, capsys):
    story = runpy.run_path(str(EXAMPLES / f"{name}.py"))["story"]
    picture = story(tmp_path, model=str(tiny_llama), steps=2, rows=2, **short)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "loss" in capsys.readouterr().out
