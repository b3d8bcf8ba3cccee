"""Adapters on a quantised base from the command line: trained, resumed, evaluated, merged."""

import shutil
from functools import partial

import pytest
import torch

import lorakit as lk
from lorakit.attachment.open_model import open_model
from lorakit.cli.main import main
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.models.quantized import Quantization, quantization_of
from lorakit.training.run import train
from references import outputs

FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")


def made(model, rows, out, **operations):
    """The settings of a short run on a 4-bit base."""
    values = {
        "model": str(model),
        "out": out,
        "lora": lk.LoRAConfig(rank=8, targets=("all-linear",), dropout=0.1),
        "data": DataConfig(train=str(rows), validation=str(rows)),
        "quantize": "4bit",
        "dtype": "bfloat16",
        "steps": 6,
        "warmup_steps": 2,
        "learning_rate": 3e-2,
    }
    return TrainConfig(**{**values, **operations})


@pytest.fixture
def settings(tiny_llama, prompt_rows, tmp_path):
    """A maker of settings for a short run on a 4-bit base."""
    return partial(made, tiny_llama, prompt_rows, tmp_path / "adapter")


@pytest.fixture(scope="module")
def result(tiny_llama, prompt_rows, tmp_path_factory):
    """The result of one short run."""
    return train(made(tiny_llama, prompt_rows, tmp_path_factory.mktemp("trained") / "adapter"))


@pytest.fixture
def opened(result):
    """The folder of an adapter, and the model that was trained."""
    return result.out, open_model(result.out)


def ids():
    return {"input_ids": torch.arange(4, 16)[None], "attention_mask": torch.ones(1, 12).long()}


@pytest.mark.thorough
def test_training_learns_on_a_base_of_few_bits_and_records_it(settings):
    lora = lk.LoRAConfig(rank=8, targets=("all-linear", "head"))
    result = train(settings(steps=16, eval_every=16, lora=lora))
    assert result.last_loss < 0.9 * result.first_loss
    card = lk.Adapter.load(result.out).card
    assert card["quantised"] == {"bits": 4, "type": "nf4", "double": True, "dtype": "bfloat16"}
    assert "bitsandbytes" in card["versions"]


@pytest.mark.thorough
def test_a_resumed_run_ends_in_the_same_bytes(settings):
    operations = {"double_quantization": False, "memory": "balanced", "steps": 6, "save_every": 3}
    whole = train(settings(**operations))
    expected = {name: (whole.out / name).read_bytes() for name in FILES}
    shutil.rmtree(whole.out / "checkpoints" / "checkpoint-6")
    train(settings(**operations, resume=True))
    assert {name: (whole.out / name).read_bytes() for name in FILES} == expected


@pytest.mark.thorough
def test_an_adapter_is_evaluated_on_the_base_it_was_trained_on(result, run, prompt_rows):
    words = ["evaluate", "--adapter", result.out, "--data.validation", prompt_rows]
    words += ["--metrics", "loss", "--dtype", "bfloat16"]
    losses = {how: run(*words, "--quantize", how)[1]["loss"] for how in ("as-trained", "none")}
    _, default = run(*words)
    assert default["loss"] == losses["as-trained"] != losses["none"]
    assert default["loss"] == pytest.approx(result.scores["loss"], rel=1e-3)


def test_open_model_holds_the_very_weights_that_were_trained_on(opened, tiny_llama):
    _, trained = opened
    assert quantization_of(trained.model) == Quantization.of("4bit", "bfloat16")
    base, _ = lk.load_model(tiny_llama, dtype="bfloat16", quantize="4bit")
    ours, theirs = trained.model.state_dict(), base.state_dict()
    for name in theirs:
        if name.endswith("proj.weight"):
            assert torch.equal(ours[name], theirs[name])


def test_merged_into_the_dequantised_base_it_is_the_model_that_was_trained(opened, run, tmp_path):
    out, trained = opened
    code, report = run("merge", "--adapter", out, "--out", tmp_path / "merged")
    assert code == 0
    assert all(weight["base_error"] == 0 for weight in report["weights"])
    assert report["trained_change"] < 1e-4
    merged, _ = lk.load_model(tmp_path / "merged")
    torch.testing.assert_close(
        outputs(merged, ids()), outputs(trained.model, ids()), rtol=1e-4, atol=1e-4
    )


def test_merged_into_the_original_both_errors_are_reported(opened, run, tmp_path, tiny_llama):
    out, trained = opened
    code, report = run(
        "merge", "--adapter", out, "--out", tmp_path / "merged", "--into", "original"
    )
    assert code == 0
    original, _ = lk.load_model(tiny_llama)
    merged, _ = lk.load_model(tmp_path / "merged")
    adapted = trained.model.get_submodule("model.layers.0.mlp.up_proj")
    name = "model.layers.0.mlp.up_proj.weight"
    (weight,) = (each for each in report["weights"] if each["name"] == name)
    update = merged.get_parameter(name) - original.get_parameter(name)
    lk.switch(trained.model, None)
    with torch.no_grad():
        held = adapted(torch.eye(adapted.in_features)).T
        error = (original.get_parameter(name) - held).norm() / update.norm()
    assert weight["base_error"] == pytest.approx(error.item(), rel=1e-3)
    assert 0 < weight["rounding_error"] < 1e-3
    assert report["trained_change"] > 1e-3


def test_the_report_shows_both_errors_as_text(opened, tmp_path, capsys):
    out, _ = opened
    words = ["merge", "--adapter", out, "--out", tmp_path / "merged", "--into", "original"]
    assert main(list(map(str, words))) == 0
    text = capsys.readouterr().out
    assert "lost to rounding  |W-Q(W)|/|dW|" in text
    assert "against the model that was trained, on its quantised base" in text


@pytest.mark.thorough
def test_a_base_that_was_not_quantised_has_no_dequantised_form(settings, run, tmp_path):
    out = train(settings(quantize=None, steps=3, check_after=3)).out
    code, result = run("merge", "--adapter", out, "--out", tmp_path / "m", "--into", "original")
    assert code == 2
    assert "was not trained on a quantised base" in result["error"]["message"]
