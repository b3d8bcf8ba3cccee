"""The verb chat: lines that are piped in are answered, and commands change who answers."""

import dataclasses
import io
import json
import shutil

import huggingface_hub
import pytest

import lorakit as lk
from lorakit.cli.main import main


@pytest.fixture
def adapter(tiny_llama, prompt_rows, tmp_path, run):
    """The folder of a short training."""
    words = ["--model", tiny_llama, "--data.train", prompt_rows, "--dtype", "float32"]
    code, _ = run("train", *words, "--out", tmp_path / "words", "--steps", 4, "--warmup-steps", 1)
    assert code == 0
    return tmp_path / "words"


@pytest.fixture
def chat(adapter, monkeypatch, capsys):
    """A function that pipes lines into chat and gives back its exit code, result and stderr."""

    def talk(*lines, words=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        more = ("--max-new-tokens", "4", "--json", *words)
        code = main(["chat", str(adapter), *more])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return talk


def test_lines_are_answered_by_the_adapter_or_the_base_that_was_chosen(adapter, chat, run):
    code, result, _ = chat("red cat", "", "/base", "red cat", "/adapter words", "/exit", "never")
    assert code == 0
    assert [turn["adapter"] for turn in result["turns"]] == ["words", None]
    expected = run("generate", "--adapter", adapter, "--prompt", "red cat", "--max-new-tokens", 4)[
        1
    ]
    assert result["turns"][0]["answer"] == expected["answers"][0]["answer"]


def test_a_mistake_is_told_and_the_conversation_goes_on(chat, tmp_path, adapter):
    again = shutil.copytree(adapter, tmp_path / "again")
    lines = ("/adaptr x", "/adapter wrods", f"/load {tmp_path / 'none'}", "/retry", "red")
    code, result, err = chat(*lines, f"/load {again}", "big", "/retry", "/adapter", "/help")
    assert code == 0
    assert [(turn["adapter"], turn["prompt"]) for turn in result["turns"]] == [
        ("words", "red"),
        ("again", "big"),
    ]
    for told in (
        "error: there is no command /adaptr; did you mean '/adapter'?",
        "error: there is no adapter 'wrods'; did you mean 'words'?",
        "error: nothing was asked yet",
        "again answers, each line alone, as it was trained",
        "  words\n* again\n",
        "/exit            end",
    ):
        assert told in err
    assert err.count("error: ") == 4
    assert str(tmp_path / "none") in err


def test_an_adapter_whose_card_is_refused_is_not_loaded(chat, tmp_path, adapter):
    # Under a name that is held already: what it held still answers.
    good = lk.Adapter.load(adapter)
    bad = dataclasses.replace(good, card={**good.card, "task": "cooking"})
    other = bad.save(tmp_path / "other" / "words")
    fresh = shutil.copytree(other, tmp_path / "fresh")
    code, result, err = chat("red", f"/load {other}", f"/load {fresh}", "/adapter", "/retry")
    assert code == 0
    assert err.count("the adapter's training card cannot be used") == 2
    assert "* words\n" in err
    assert "fresh\n" not in err.partition("* words")[2]
    assert [turn["adapter"] for turn in result["turns"]] == ["words"]


def test_folders_of_one_name_are_refused(chat, adapter):
    code, result, _ = chat(words=[str(adapter)])
    assert code == 2
    assert "two adapters are called words" in result["error"]["message"]


def test_an_adapter_of_the_hub_is_called_by_its_name(chat, adapter, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--someone--e2e"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(adapter, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    code, result, err = chat("/adapter e2e", "red", "/load", words=["someone/e2e@v1"])
    assert code == 0
    assert [turn["adapter"] for turn in result["turns"]] == ["e2e"]
    assert "error: /load needs a folder, or OWNER/NAME on the hub" in err


def test_an_adapter_answers_through_the_chat_template_of_its_folder(chat, adapter, tmp_path, run):
    own = tmp_path / "own"
    assert run("convert", adapter, own, "--to", "peft")[0] == 0
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (own / "chat_template.jinja").write_text(template)
    code, result, err = chat("red", f"/load {own}", "/clear", "red", "/adapter words")
    assert code == 0
    # The template writes what rows of prompts have: the line, and a line break.
    assert [turn["answer"] for turn in result["turns"]] == [result["turns"][0]["answer"]] * 2
    assert "own answers\n" in err
    assert "words answers, each line alone, as it was trained\n" in err
