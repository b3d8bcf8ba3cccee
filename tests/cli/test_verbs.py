"""The verbs end to end, on tiny models: train, evaluate, generate, merge, convert."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import lorakit as lk
from lorakit.attachment.open_model import open_model
from lorakit.cli.main import main


@pytest.fixture(scope="module")
def trained_once(tiny_llama, prompt_rows, tmp_path_factory):
    """The folder of an adapter trained by the command line."""
    out = tmp_path_factory.mktemp("trained") / "adapter"
    words = ["train", "--model", tiny_llama, "--out", out, "--data.train", prompt_rows, "--json"]
    more = ["--steps", 8, "--warmup-steps", 2, "--lora.targets", "all-linear", "--dtype", "float32"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([str(word) for word in (*words, *more)]) == 0
    assert json.loads(printed.getvalue())["steps"] == 8
    return out


@pytest.fixture
def trained(trained_once, tmp_path):
    """The folder of a copy that belongs to one test."""
    return shutil.copytree(trained_once, tmp_path / "adapter")


def test_train_dry_run_shows_what_would_be_trained_and_writes_nothing(
    tiny_llama, prompt_rows, tmp_path, run
):
    words = ["train", "--model", tiny_llama, "--data.train", prompt_rows, "--dry-run"]
    code, result = run(*words, "--out", tmp_path / "none", "--warmup-steps", 20)
    assert code == 2
    assert "warmup_steps 20 leaves nothing of the run's 8 steps" in result["error"]["message"]
    code, result = run(*words, "--out", tmp_path / "none")
    assert code == 0
    assert result["rows"] == 64
    assert result["parameters"] == sum(8 * (32 + out) for out in (32, 16)) * 2
    assert not (tmp_path / "none").exists()


def test_evaluate_gives_the_scores_of_base_and_adapter(
    trained, tiny_llama, prompt_rows, run, tmp_path
):
    rows = ["--data.validation", prompt_rows, "--data.validation-rows", 16]
    code, with_adapter = run("evaluate", "--adapter", trained, *rows)
    assert code == 0
    assert with_adapter.keys() >= {"loss", "perplexity", "exact_match", "bleu"}
    _, base = run("evaluate", "--model", tiny_llama, *rows, "--metrics", "loss")
    assert with_adapter["loss"] < base["loss"]
    assert "bleu" not in base
    answers = tmp_path / "answers.jsonl"
    run("evaluate", "--adapter", trained, *rows, "--metrics", "bleu", "--outputs", answers)
    first = json.loads(answers.read_text().splitlines()[0])
    assert first.keys() == {"prompt", "answer", "references"}
    code, _ = run("evaluate", "--adapter", trained, *rows, "--outputs", answers)
    assert code == 2


def test_generate_answers_a_prompt_a_file_and_standard_input(trained, tmp_path, run, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("red cat dog\nbig fish bird\n")
    short = ["--adapter", trained, "--max-new-tokens", 4]
    _, one = run("generate", *short, "--prompt", "red cat dog")
    _, many = run("generate", *short, "--input", file)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    _, piped = run("generate", *short, "--input", "-")
    assert [pair["prompt"] for pair in many["answers"]] == ["red cat dog", "big fish bird"]
    assert one["answers"][0]["answer"] == many["answers"][0]["answer"]
    assert piped == many
    code, result = run("generate", *short)
    assert code == 2
    assert "either prompt, or input" in result["error"]["message"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merge_writes_a_checkpoint_that_transformers_loads_alone(trained, tmp_path, run, dtype):
    out = tmp_path / "merged"
    code, report = run("merge", "--adapter", trained, "--out", out, "--dtype", dtype)
    assert code == 0
    assert len(report["weights"]) == 14
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    adapted = open_model(trained).model
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        found, expected = plain(ids).logits, adapted(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)
    code, _ = run("merge", "--adapter", trained, "--out", out)
    assert code == 2


def test_a_merge_outside_a_terminal_shows_no_bars(trained, tmp_path, monkeypatch, capsys):
    words = ["merge", "--adapter", str(trained), "--out", str(tmp_path / "merged")]
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("lorakit.cli.merge.is_terminal", lambda: True)
    assert main([*words[:-1], str(tmp_path / "again")]) == 0
    assert "\r" in capsys.readouterr().err


def flip_a_weight(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def cut_short(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def fill_the_disk(folder):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("accident", "text"),
    [
        (flip_a_weight, "read back differently (1 problem)"),
        (cut_short, "read back differently: "),
        (fill_the_disk, "could not be written: I/O error: No space left"),
    ],
)
def test_a_merged_model_that_is_damaged_in_writing_is_noticed_and_not_kept(
    trained, tmp_path, run, monkeypatch, accident, text
):
    save = PreTrainedModel.save_pretrained

    def save_badly(self, folder, **keywords):
        save(self, folder, **keywords)
        accident(folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_badly)
    before = sorted(tmp_path.iterdir())
    code, result = run("merge", "--adapter", trained, "--out", tmp_path / "merged")
    assert code == 2
    assert text in result["error"]["message"]
    assert str(tmp_path / "merged") in result["error"]["message"]
    assert sorted(tmp_path.iterdir()) == before


def test_merge_makes_the_parents_of_out_but_not_of_a_file(trained, tmp_path, run):
    code, _ = run("merge", "--adapter", trained, "--out", tmp_path / "new" / "deep" / "merged")
    assert code == 0
    assert [path.name for path in (tmp_path / "new" / "deep").iterdir()] == ["merged"]
    (tmp_path / "file").write_text("")
    code, result = run("merge", "--adapter", trained, "--out", tmp_path / "file" / "merged")
    assert code == 2
    assert f"{tmp_path / 'file' / 'merged'} is below the file" in result["error"]["message"]


@pytest.mark.thorough
def test_a_classifier_is_trained_evaluated_and_merged(tiny_bert, label_rows, tmp_path, run):
    out, rows = tmp_path / "classifier", ["--data.validation", label_rows]
    words = ["--model", tiny_bert, "--data.train", label_rows, *rows, "--steps", 120]
    rate = ["--learning-rate", 1e-2, "--dtype", "float32"]
    code, result = run("train", *words, *rate, "--out", out, "--lora.targets", "attention")
    assert code == 0
    _, scores = run("evaluate", "--adapter", out, *rows)
    assert scores["accuracy"] == pytest.approx(result["scores"]["accuracy"])
    assert scores["accuracy"] > 0.9
    run("merge", "--adapter", out, "--out", tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert plain.config.id2label == {0: "no", 1: "yes"}
    adapted = open_model(out).model
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    code, result = run("generate", "--adapter", out, "--prompt", "red")
    assert code == 2
    assert "classification" in result["error"]["message"]


def test_convert_goes_to_peft_and_back_without_a_changed_bit(trained, tiny_llama, tmp_path, run):
    code, there = run("convert", "--source", trained, "--out", tmp_path / "peft", "--to", "peft")
    assert code == 0
    assert not (tmp_path / "peft" / "lorakit.json").exists()
    words = ["--source", tmp_path / "peft", "--out", tmp_path / "back", "--model", tiny_llama]
    code, back = run("convert", *words)
    assert code == 0
    assert back["content_hash"] == there["content_hash"]
    assert any("base" in note for note in back["unverified"])
    assert lk.Adapter.load(tmp_path / "back").base.name == str(tiny_llama)


def test_a_loralib_file_is_converted_with_what_it_does_not_say(trained, tmp_path, run):
    tensors = lk.Adapter.load(trained).tensors
    renamed = {
        k.replace("lora_a", "lora_A").replace("lora_b", "lora_B"): v for k, v in tensors.items()
    }
    torch.save(renamed, tmp_path / "old.pt")
    words = ["--source", tmp_path / "old.pt", "--out", tmp_path / "new"]
    code, result = run("convert", *words)
    assert code == 2
    code, result = run(*["convert", *words], "--lora.rank", 8, "--lora.targets", "all-linear")
    assert code == 0
    assert result["parameters"] == sum(t.numel() for t in tensors.values())


def test_another_base_of_equal_shapes_is_refused_by_every_verb(trained, tmp_path, run, prompt_rows):
    from transformers import AutoTokenizer

    from tiny_models import build

    other = tmp_path / "other"
    build("llama", seed=7).save_pretrained(other)
    base = lk.Adapter.load(trained).base.name
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    for words in (
        ["evaluate", "--data.validation", prompt_rows],
        ["generate", "--prompt", "red"],
        ["merge", "--out", tmp_path / "merged"],
    ):
        code, result = run(*words, "--adapter", trained, "--model", other)
        assert code == 2
        assert "trained on another base" in result["error"]["message"]
    assert not (tmp_path / "merged").exists()
