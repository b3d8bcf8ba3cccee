"""The program of `make gpu`: parts that fail or take too long are lines, and the others go on."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    """The module benchmarks/gpu.py."""
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)
    spec.loader.exec_module(module)
    return module


def test_every_part_ends_as_a_line_of_the_table(program, tmp_path, capsys):
    told = tmp_path / "told.json"
    told.write_text(json.dumps({"told": ["1B 5 tokens/s", "8B 1 token/s"]}))
    bare = ("-I", "-S", "-c")

    def part(name, code, **more):
        made = program.Part(name=name, **{"limit_s": 60, "words": (*bare, code), **more})
        return program.outcome(made, 60)

    found = [
        part("measured", "print('much')", result=told),
        part("tests", "print('3 passed')"),
        part("wrong", "raise SystemExit('no card')"),
        part("long", "import time; time.sleep(60)", limit_s=0.2),
        program.outcome(program.Part(name="late", limit_s=60, words=()), 0),
    ]
    states = ["done", "done", "failed (1)", "cut", "left out"]
    assert [each.state for each in found] == states
    lines = program.table(found).splitlines()
    ends = ["1B 5 tokens/s; 8B 1 token/s", "3 passed", "no card", "", "no time was left"]
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == 5 * [True]
    assert "== measured\nmuch" in capsys.readouterr().out


def test_the_parts_are_programs_that_there_are_and_end_in_time(program, tmp_path):
    parts = program.parts(tmp_path, tiny=False)
    files = [Path(part.words[0]) for part in parts if part.result]
    assert len(files) == 4
    assert all(file.exists() and file.parent == BENCHMARKS for file in files)
    assert sum(part.limit_s for part in parts) <= program.BUDGET_S < 480


def test_what_this_python_lacks_is_named_before_anything_runs(program, monkeypatch):
    assert program.missing() == []
    monkeypatch.setattr(program, "_is_installed", lambda name: name not in ("pydantic", "pyyaml"))
    assert program.missing() == ["pydantic>=2.11", "pyyaml>=6.0"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    with pytest.raises(SystemExit, match=r"'pydantic>=2\.11' 'pyyaml>=6\.0': python -m pip"):
        program.main()


def test_only_files_with_tests_of_a_gpu_are_collected(program):
    names = {Path(file).name for file in program.gpu_tests()}
    assert {"test_liger.py", "test_segments_triton.py", "test_graphed_steps.py"} <= names
    assert len(names) < 10
