"""The environment of a measurement: which commit, and when a result may be written."""

import importlib
import json
import subprocess
from pathlib import Path

import pytest

from lorakit.bench import environment, result
from lorakit.bench.environment import uncommitted
from lorakit.bench.result import check_result, without_places
from lorakit.cli.main import main
from lorakit.errors import OutputError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def git(folder, *words):
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with a source, a result, and an ignored folder that has a source too."""
    for name in ("src/source.py", "benchmarks/results/x.json", "installed/source.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.write_text("0\n")
    (tmp_path / ".gitignore").write_text("installed/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "All")
    return tmp_path


def test_a_commit_is_named_and_says_when_it_is_not_what_is_measured(checkout, monkeypatch):
    source = checkout / "src" / "source.py"
    monkeypatch.setattr(environment, "SOURCE", source)
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert environment.environment()["commit"] == commit
    (checkout / ".gitignore").write_text("installed/\nbuild/\n")
    assert environment.environment()["commit"] == f"{commit}-dirty"


def test_only_changes_of_tracked_files_count_and_those_of_results_do_not(checkout):
    source = checkout / "src" / "source.py"
    (checkout / "benchmarks" / "results" / "x.json").write_text("1\n")
    (checkout / "new.py").write_text("1\n")
    assert uncommitted(source) == []
    source.write_text("1\n")
    assert uncommitted(source) == ["src/source.py"]
    git(checkout, "add", "src", "new.py")
    assert uncommitted(source.parent) == ["new.py", "src/source.py"]


def test_an_installed_package_has_no_commit_even_inside_a_checkout(checkout, monkeypatch):
    installed = checkout / "installed" / "source.py"
    (checkout / "src" / "source.py").write_text("1\n")
    monkeypatch.setattr(environment, "SOURCE", installed)
    assert uncommitted(installed) == []
    assert environment.environment()["commit"] is None


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    assert uncommitted(checkout / "src" / "source.py") == []


def test_a_result_is_refused_before_the_work_where_changes_are_uncommitted(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(result, "uncommitted", lambda: ["a.py", "b.py", "c.py", "d.py"])
    out = tmp_path / "x.json"
    words = ["bench", "switch", "--model", "no-such-model", "--no-peer", "--json"]
    assert main([*words, "--out", str(out)]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == {
        "type": "OutputError",
        "message": f"{out} cannot be written: a.py, b.py, c.py, … have uncommitted changes, so no "
        "commit would have the code that was measured. Commit first, or leave out --out to see "
        "the tables alone",
    }
    assert not out.exists()
    check_result(None)
    monkeypatch.setattr(result, "uncommitted", lambda: ["a.py"])
    with pytest.raises(OutputError, match=r"a\.py has uncommitted changes"):
        check_result(out)


def test_a_benchmark_program_is_refused_at_its_beginning(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    measured = importlib.import_module("measured")
    out = tmp_path / "x.json"
    assert measured.begin(out).keys() == {"commit", "versions", "hardware"}
    monkeypatch.setattr(result, "uncommitted", lambda: ["a.py"])
    with pytest.raises(SystemExit, match=r"^error: .*x\.json cannot be written: a\.py has"):
        measured.begin(out)
    assert measured.begin(None)["versions"]


def test_a_result_names_no_place_of_this_machine():
    told = {"model": "/home/someone/bases/small", "families": ["llama", "/bases/mine.gguf"], "n": 1}
    assert without_places(told) == {"model": "small", "families": ["llama", "mine.gguf"], "n": 1}
    assert without_places({"model": "smollm2", "file": "out/a.gguf", "none": None}) == {
        "model": "smollm2",
        "file": "out/a.gguf",
        "none": None,
    }
