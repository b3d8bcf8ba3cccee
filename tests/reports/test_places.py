"""Paths, folders, seeds and settings without effect: right, or refused before anything is done."""

import json
import os
import resource

import pytest
from pydantic import BaseModel

import lorakit as lk
import lorakit.training.prepare as preparation
import lorakit.training.task_rows as reading
from lorakit.cli.main import main
from lorakit.cli.verbs import VERBS, settings_of
from lorakit.config.seed import generator_seed
from lorakit.config.train import TrainConfig
from lorakit.errors import ConfigError, OutputError
from lorakit.training.run import train
from lorakit.training.run_folder import LOCK, locked
from lorakit.training.sweep.sweep import sweep


@pytest.fixture
def settings(tiny_llama, prompt_rows, tmp_path):
    def make(**changes):
        values = {
            "model": str(tiny_llama),
            "out": tmp_path / "run",
            "data": {"train": str(prompt_rows)},
            "dtype": "float32",
            "steps": 4,
            "warmup_steps": 0,
            "learning_rate": 1e-2,
        }
        return TrainConfig(**{**values, **changes})

    return make


@pytest.fixture
def no_work(monkeypatch):
    """Let everything fail that comes after the checks of a run's folder."""

    def fail(*_, **__):
        raise AssertionError("the rows were read")

    monkeypatch.setattr(reading, "read_rows", fail)


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(out="~/run", init_from="~/other")
    assert (config.out, config.init_from) == (tmp_path / "run", str(tmp_path / "other"))
    (tmp_path / "c.yaml").write_text("out: ~/run\nresume: true\n")
    assert main(["train", "~/c.yaml", "--print-config"]) == 0
    with pytest.raises(ConfigError, match=r"init_from: ~nobody-of-this-name/x"):
        TrainConfig(out="run", init_from="~nobody-of-this-name/x")


def path_settings():
    for verb in VERBS:
        verb_settings: type[BaseModel] = settings_of(verb)
        for name, field in verb_settings.model_fields.items():
            if "Path" in str(field.annotation) and "tuple" not in str(field.annotation):
                yield pytest.param(verb_settings, name, id=f"{verb} {name}")


@pytest.mark.parametrize(("verb_settings", "name"), list(path_settings()))
def test_an_empty_path_is_refused(verb_settings, name):
    with pytest.raises(ConfigError, match=f"{name}: is empty"):
        verb_settings(**{name: ""})


def test_an_empty_out_deletes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert main(["train", "--out", "", "--overwrite"]) == 2
    assert "out: is empty" in capsys.readouterr().err
    assert (tmp_path / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "is a file, and a run writes a folder"),
        ("file/below", "is below the file"),
        ("/proc/run", "cannot be written"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_impossible_out_is_refused_first(
    settings, no_work, tmp_path, monkeypatch, out, message, overwrite
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=message):
        train(settings(out=out, overwrite=overwrite))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "--adapter", "none", "--out", "file/below"),
        ("convert", "--source", "none", "--out", "file/below"),
        ("demo", "--out", "file/below"),
        ("inspect", "none", "--html", "file/below"),
        ("inspect", "none", "--figures", "file/below"),
        ("compare", "none", "none", "--html", "file/below"),
        ("evaluate", "--data.validation", "rows.jsonl", "--outputs", "file/below"),
    ],
)
def test_each_verb_refuses_an_impossible_out_first(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(list(words)) == 2
    assert "is below the file file" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "/", "folder", "~"])
def test_a_report_is_no_folder(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    assert main(["inspect", "none", "--html", place]) == 2
    assert "is a folder, and a file is written" in capsys.readouterr().err


def test_overwrite_spares_what_no_run_has_made(settings, no_work, tmp_path):
    project = tmp_path / "run"
    (project / "checkpoints").mkdir(parents=True)
    (project / "checkpoints" / "best.pt").write_text("mine")
    with pytest.raises(OutputError, match="holds checkpoints and no run"):
        train(settings(overwrite=True))
    assert (project / "checkpoints" / "best.pt").read_text() == "mine"


@pytest.mark.thorough
def test_overwrite_replaces_a_run(settings):
    train(settings(save_every=2))
    assert train(settings(overwrite=True, steps=2)).steps == 2
    assert [each.name for each in (settings().out / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_second_run_in_one_folder_is_refused(settings, no_work):
    with locked(settings().out):
        for start in (train, sweep):
            config = settings(sweep={"seed": [0, 1]} if start is sweep else None)
            with pytest.raises(OutputError, match="is being written by another run"):
                start(config)
    assert not settings().out.exists()


@pytest.mark.thorough
def test_a_run_that_ended_leaves_its_folder_free(settings):
    train(settings(steps=2))
    assert not (settings().out / LOCK).exists()
    assert train(settings(steps=4, resume=True)).steps == 4


def test_a_full_disk_is_one_message_and_the_last_checkpoint_stays(settings, capfd):
    config = settings(method="full", steps=2)
    train(config)
    weights = (config.out / "adapter_model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Enough for the weights, and not for the optimizer's two moments of each.
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * weights), before[1]))
    try:
        with pytest.raises(OutputError, match="the checkpoint of step 4 could not be") as raised:
            train(settings(method="full", steps=4, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "That of step 2 is kept: make room, and give --resume" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert os.listdir(config.out / "checkpoints") == ["checkpoint-2"]
    assert train(settings(method="full", steps=4, resume=True)).steps == 4


def test_a_log_that_cannot_be_written_is_one_message(settings, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorakit.training.record.JsonLines.on_log", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        train(settings())


@pytest.mark.parametrize("seed", [2**32, 1_732_000_000_000, 2**64, 10**30])
def test_seeds_of_any_size(seed):
    assert 0 <= generator_seed(seed) < 2**32
    assert generator_seed(seed) == generator_seed(seed) != generator_seed(seed + 1)
    assert generator_seed(seed % 2**32) == seed % 2**32


@pytest.mark.thorough
def test_a_run_with_a_large_seed_repeats(settings, tmp_path):
    runs = [train(settings(out=tmp_path / name, seed=2**64)) for name in ("one", "two")]
    first, second = (lk.Adapter.load(run.out) for run in runs)
    assert first.content_hash() == second.content_hash()
    card = json.loads((runs[0].out / "lorakit.json").read_text())["card"]
    assert card["settings"]["seed"] == 2**64


@pytest.mark.parametrize(
    "given", [{"patience": 2}, {"eval_every": 5}, {"data": {"validation_rows": 8}}]
)
def test_scoring_without_rows_to_score_is_refused(given):
    with pytest.raises(ConfigError, match=r"data\.validation names no rows to score"):
        TrainConfig(out="run", **given)


def test_settings_without_effect_are_said(settings):
    config = settings(
        method="bitfit",
        bitfit={"add_missing": True},
        lora={"rank": 4, "svd_iterations": 3},
        bottleneck={"size": 2},
        epochs=3,
        double_quantization=False,
        eva_batches=2,
    )
    text = preparation.prepare(config).describe().splitlines()[-1]
    assert text == (
        "without effect: lora.rank (method is bitfit), lora.svd_iterations (method is bitfit), "
        "bottleneck.size (method is bitfit), epochs (steps are given), eva_batches (nothing starts "
        "by init eva), double_quantization (quantize is None)"
    )


def test_nothing_is_said_of_settings_that_have_an_effect(settings):
    assert "without effect" not in preparation.prepare(settings(lora={"rank": 4})).describe()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("generate", "--prompt", "x", "--top-p", "0.5"), "temperature is 0"),
        (("evaluate", "--metrics", "loss"), "outputs is a file for answers"),
    ],
)
def test_other_verbs_refuse_settings_without_effect(
    words, message, tiny_llama, prompt_rows, tmp_path, capsys
):
    scored = ["--data.validation", str(prompt_rows), "--outputs", str(tmp_path / "o.jsonl")]
    more = scored if words[0] == "evaluate" else []
    assert main([*words, "--model", str(tiny_llama), *more]) == 2
    assert message in capsys.readouterr().err
