"""`report_to` with the trackers themselves, each in its environment and without a network."""

import json
from pathlib import Path

import pytest

from tools.environments import run

pytestmark = pytest.mark.thorough
PREFIXES = {"wandb": ("train/", "eval/"), "mlflow": ("", "eval_"), "trackio": ("train/", "eval/")}
"""What transformers' callbacks put before names of figures, and of scores."""


@pytest.mark.parametrize("tracker", PREFIXES)
def test_a_tracker_has_figures_and_settings(tracker, tiny_llama, prompt_rows, tmp_path):
    variables = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": "sqlite:///runs.db",
        "TRACKIO_DIR": tmp_path / "trackio",
    }
    program = Path(__file__).parent / "report_to.py"
    words = [program, tracker, tiny_llama, prompt_rows]
    told = run(tracker, *words, variables=variables, cwd=tmp_path)
    assert "gets no more of this run" not in told
    (line,) = [each for each in told.splitlines() if each.startswith('{"settings"')]
    found = json.loads(line)
    assert str(found["settings"]["lora.rank"]) == "2"
    assert str(found["settings"]["model"]) == str(tiny_llama)
    logged = [
        json.loads(each) for each in (tmp_path / "mine" / "log.jsonl").read_text().splitlines()
    ]
    figure, score = PREFIXES[tracker]
    for name, key in (
        (f"{figure}loss", "loss"),
        (f"{figure}learning_rate", "learning_rate"),
        (f"{score}loss", "eval_loss"),
    ):
        ours = [entry[key] for entry in logged if key in entry]
        assert found["figures"][name] == pytest.approx(ours), name
