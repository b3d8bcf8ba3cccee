"""`lorakit paper run --ray local`: cells on a cluster leave the results that they leave here."""

import json

import pytest

from tools.environments import lorakit_on_ray, python_of

pytestmark = pytest.mark.thorough

CELLS_OF_THE_TEST = """
import sys
if any(word in " ".join(sys.orig_argv) for word in ("default_worker", "lorakit")):
    from pathlib import Path
    from lorakit.paper import cell, check
    cell.FOLDER = Path({folder!r})
    check.uncommitted = list
"""


def test_cells_on_a_cluster_leave_the_results_that_they_leave_here(finished, data, cells, tmp_path):
    python_of("ray")
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(CELLS_OF_THE_TEST.format(folder=str(cells)))
    words = ["--results", tmp_path / "there", "--data", data, "--work", tmp_path / "work"]
    line = ["paper", "run", "table9.lora", "--seeds", "0", "--ray", "local", *words]
    told = lorakit_on_ray(*line, cwd=tmp_path, paths=[hook])
    assert "[2/2]" in told
    for task in ("cola", "stsb"):
        ours, theirs = (
            json.loads((folder / "table9.lora.small" / task / "seed-0.json").read_text())
            for folder in (tmp_path / "results", tmp_path / "there")
        )
        assert ours.keys() == theirs.keys()
        for name in ("scores", "settings", "data", "parameters", "status"):
            assert ours[name] == theirs[name], name
    before = sorted((tmp_path / "there").rglob("*"))
    again = lorakit_on_ray(*line, cwd=tmp_path, paths=[hook])
    assert "[1/" not in again
    assert sorted((tmp_path / "there").rglob("*")) == before
