"""Completion: what a shell proposes after the words that are typed."""

import json
import shutil
import subprocess

import pytest

from lorakit.cli.main import main

shtab = pytest.importorskip("shtab")

COMPLETE = """
COMP_WORDS=({words} ''); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
_shtab_lorakit; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def script(capsys):
    """A function that gives the script of a shell."""

    def of(shell):
        assert main(["completion", shell, "--json"]) == 0
        return json.loads(capsys.readouterr().out)["script"]

    return of


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        ("lorakit", {"train", "bench", "completion"}),
        ("lorakit bench", {"latency", "train"}),
        ("lorakit train --schedule", {"linear", "cosine", "constant"}),
        ("lorakit completion", {"bash", "zsh", "fish"}),
    ],
)
def test_bash_proposes_verbs_flags_and_choices(script, tmp_path, words, proposed):
    file = tmp_path / "complete.bash"
    file.write_text(script("bash") + COMPLETE.format(words=words))
    done = subprocess.run(["bash", str(file)], capture_output=True, text=True, check=True)
    assert proposed <= set(done.stdout.split()), done.stdout


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_proposes_verbs_flags_and_choices(script, tmp_path):
    file = tmp_path / "complete.fish"
    typed = ("lorakit tra", "lorakit train --lora.ra", "lorakit train --schedule ")
    asked = "\n".join(f"complete -C '{words}'" for words in typed)
    file.write_text(f"{script('fish')}\n{asked}\n")
    done = subprocess.run(
        ["fish", "--no-config", str(file)], capture_output=True, text=True, check=True
    )
    proposed = {line.partition("\t")[0] for line in done.stdout.splitlines()}
    assert proposed == {
        *("train", "--lora.rank", "--lora.rank-pattern"),
        *("linear", "cosine", "constant"),
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_knows_every_verb_and_flag(script, shell):
    text = script(shell)
    for word in (
        "train",
        "latency",
        "warmup-steps",
        "lora.rank-pattern",
        "no-overwrite",
        "dry-run",
    ):
        assert word in text
