"""`lorakit train --ray local`: the trials of a sweep on a cluster, as if run here."""

import json

import pytest

import lorakit as lk
from tools.environments import lorakit_on_ray, python_of

pytestmark = pytest.mark.thorough


def config_of(tiny_llama, prompt_rows, out, **more):
    return lk.TrainConfig(
        model=str(tiny_llama),
        out=out,
        data={"train": str(prompt_rows), "validation": str(prompt_rows), "validation_rows": 4},
        lora={"rank": 2},
        steps=4,
        save_every=2,
        eval_every=2,
        batch_size=4,
        learning_rate=1e-2,
        dtype="float32",
        **more,
    )


def files_of(folder):
    found = {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}
    return {each for each in found if "tensorboard" not in each}


def members(folder):
    found = json.loads((folder / "sweep.json").read_text())["members"]
    return {each["name"]: (each["status"], each["settings"], each["config"]) for each in found}


def test_trials_on_a_cluster_leave_what_they_leave_here(tiny_llama, prompt_rows, tmp_path):
    python_of("ray")
    sweep = {"lora.rank": [1, 3]}
    here, there = tmp_path / "here", tmp_path / "there"
    lk.sweep(config_of(tiny_llama, prompt_rows, here, sweep=sweep))
    file = tmp_path / "sweep.yaml"
    config = config_of(tiny_llama, prompt_rows, there, sweep=sweep)
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    told = lorakit_on_ray("train", file, "--ray", "local", cwd=tmp_path)
    assert "2 adapters" in told
    assert files_of(there) == files_of(here)
    assert members(there) == members(here)
    alone = lk.train(
        config_of(tiny_llama, prompt_rows, tmp_path / "alone", seed=0).model_copy(
            update={"lora": lk.LoRAConfig(rank=3)}
        )
    )
    for name in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        assert (there / "rank=3" / name).read_bytes() == (alone.out / name).read_bytes()

    # One of them as if the machine had stopped after its first checkpoint, and on again.
    figures = json.loads((there / "sweep.json").read_text())
    (trial,) = [each for each in figures["members"] if each["name"] == "rank=3"]
    trial.update(status="unfinished", result=None)
    (there / "sweep.json").write_text(json.dumps(figures))
    weights = (there / "rank=3" / "adapter_model.safetensors").read_bytes()
    (there / "rank=3" / "adapter_model.safetensors").unlink()
    for each in (there / "rank=3" / "checkpoints" / "checkpoint-4").iterdir():
        each.unlink()
    (there / "rank=3" / "checkpoints" / "checkpoint-4").rmdir()
    first = (there / "rank=1" / "log.jsonl").stat().st_mtime_ns
    lorakit_on_ray("train", file, "--ray", "local", "--resume", cwd=tmp_path)
    assert (there / "rank=3" / "adapter_model.safetensors").read_bytes() == weights
    assert (there / "rank=1" / "log.jsonl").stat().st_mtime_ns == first
    assert members(there) == members(here)


def test_an_address_where_nothing_answers_is_one_message(tiny_llama, prompt_rows, tmp_path):
    sweep = {"lora.rank": [1, 3]}
    config = config_of(tiny_llama, prompt_rows, tmp_path / "out", sweep=sweep)
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    told = lorakit_on_ray("train", file, "--ray", "127.0.0.1:1", cwd=tmp_path, code=2)
    assert "no cluster of Ray answers at 127.0.0.1:1" in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists()
