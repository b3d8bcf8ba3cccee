"""The verb score, on files of a few lines."""

import json
from pathlib import Path

import pytest

from lorakit.cli.main import main


def test_files_are_scored_and_the_scorer_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs, references = tmp_path / "outputs.txt", tmp_path / "references.json"
    outputs.write_text("1\r\n0\nequivalent\n")
    references.write_text("[1, 1, 1]")
    words = ["score", str(outputs), str(references), "--task", "mrpc"]
    assert main(words) == 0
    assert "accuracy  0.6667" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["f1"] == pytest.approx(0.8)
    assert "version 1" in found["scorer"]


def test_queries_are_json_and_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query = {"sel": 0, "agg": 0, "conds": []}
    (tmp_path / "o").write_text(json.dumps(query) + "\nnull\n")
    (tmp_path / "r").write_text(json.dumps([query, query]))
    files = ["--outputs", str(tmp_path / "o"), "--references", str(tmp_path / "r")]
    assert main(["score", "--task", "wikisql", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logical_form"] == 0.5


@pytest.mark.parametrize(
    ("references", "message"),
    [("{}", "must be a JSON list"), ("[1", "is no JSON"), ("[1]", "2 outputs and 1 references")],
)
def test_files_that_cannot_be_scored_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], references: str, message: str
) -> None:
    (tmp_path / "o").write_text("1\n0\n")
    (tmp_path / "r").write_text(references)
    words = ["score", str(tmp_path / "o"), str(tmp_path / "r"), "--task", "sst2"]
    assert main(words) == 2
    assert message in capsys.readouterr().err
