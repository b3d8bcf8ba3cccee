"""The demo from end to end, on a tiny model that learns nothing."""

import json
import shutil

import pytest

from lorakit.cli import demo
from lorakit.cli.main import main


@pytest.fixture
def wide_llama(tiny_llama, tmp_path):
    """A tiny model with room for the demo's prompts and answers."""
    folder = shutil.copytree(tiny_llama, tmp_path / "wide-llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


def test_the_demo_trains_switches_merges_and_leaves_the_base_unchanged(
    wide_llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo, "MODEL", str(wide_llama))
    words = ["demo", "--out", str(tmp_path / "demo"), "--steps", "4", "--rows", "2", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base_unchanged"] is True
    assert [task["task"] for task in result["tasks"]] == ["places", "sql"]
    assert all(0 < task["adapter_bytes"] < result["model_bytes"] for task in result["tasks"])
    assert set(result["mixed"]["adapters"]) == {"places", "sql", None}
    assert result["mixed"]["same_answers"] is True
    assert [f"rank={rank}" for rank in (1, 2, 4, 8)] == list(result["sweep"])
    assert result["largest_logit_change_of_merging"] < 1e-4
    for task in ("places", "sql"):
        assert (tmp_path / "demo" / task / "lorakit.json").exists()
    assert main(words) == 2
    assert "exists and is not empty" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_demo_prints_a_table_and_what_to_do_next(wide_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", str(wide_llama))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "2", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "task      before   after   adapter" in text
    assert text.count("\n  lorakit ") == 3
