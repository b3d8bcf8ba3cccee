"""The time to the first step of a run: of a real one, and of one that fails."""

import pytest

from lorakit.bench.startup import first_step
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import TrainingError


def run(model, rows, out):
    return TrainConfig(
        model=str(model), out=out, data=DataConfig(train=str(rows)), steps=50, learning_rate=5e-5
    )


@pytest.mark.thorough
def test_a_run_is_timed_until_it_has_logged_a_step_and_is_ended_then(
    tiny_llama, prompt_rows, tmp_path
):
    config = run(tiny_llama, prompt_rows, tmp_path / "run")
    seconds = first_step(config, repeats=1, threads=1)
    assert len(seconds.rounds) == 1
    assert (config.out / "log.jsonl").read_text().startswith("{")
    assert not (config.out / "adapter_model.safetensors").exists()


def test_a_run_that_ends_too_early_is_told_with_its_own_words(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho error: no such rows\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(TrainingError, match=r"ended before its first step:\nerror: no such rows"):
        first_step(run("m", "rows", tmp_path / "run"), repeats=1, threads=1)
