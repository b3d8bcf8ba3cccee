"""The demo from end to end, on a tiny model that learns nothing."""

import json

import pytest

from lorakit.cli import demo
from lorakit.cli.main import main


def test_the_demo_trains_switches_merges_and_leaves_the_base_unchanged(
    tiny_llama, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(demo, "MODEL", str(tiny_llama))
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
def test_the_demo_prints_a_table_and_what_to_do_next(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "MODEL", str(tiny_llama))
    assert main(["demo", "--out", str(tmp_path / "demo"), "--steps", "2", "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "task      before   after   adapter" in text
    assert text.count("\n  lorakit ") == 3
