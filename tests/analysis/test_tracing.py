"""The traces of a small training run, and of a folder as Trainer with PEFT leaves it."""

import pytest

import lorakit as lk
from lorakit.analysis import spectrum, traces
from lorakit.errors import AnalysisError


def test_a_run_is_traced_to_its_final_subspace(tiny_llama, prompt_rows, tmp_path):
    lk.train(
        lk.TrainConfig(
            model=str(tiny_llama),
            out=tmp_path / "run",
            data=lk.DataConfig(train=str(prompt_rows)),
            steps=5,
            warmup_steps=1,
            save_every=1,
            keep_checkpoints=4,
            lora=lk.LoRAConfig(rank=2, targets="q"),
        )
    )
    found = traces(tmp_path / "run")
    assert [trace.step for trace in found] == [2, 3, 4, 5]
    site = "model.layers.0.self_attn.q_proj"
    norms = [trace.spectra[site].norm for trace in found]
    assert norms == sorted(norms)
    assert found[-1].spectra == spectrum(tmp_path / "run")
    last = [trace.similarity[site][-1, -1].item() for trace in found]
    assert last[-1] == pytest.approx(1)
    assert last[0] <= last[-1]


def test_peft_checkpoints_are_read_too_and_an_empty_folder_is_told(tmp_path):
    from analysis.made import adapter_of, planted

    for step in (10, 9):
        made = adapter_of({"x": planted(6, 5, [float(step)], seed=0)})
        made.save(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-best").mkdir()
    assert [trace.step for trace in traces(tmp_path / "run")] == [9, 10]
    with pytest.raises(AnalysisError, match="has no checkpoints: give the folder of a training"):
        traces(tmp_path)
