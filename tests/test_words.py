"""What README says can be done: its Python runs with the printed output, its commands are valid."""

import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import lorakit as lk
from lorakit.cli.main import main
from references import attach_random

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_the_python_of_the_readme_prints_what_it_says(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program = blocks("python")[number]
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == blocks("text")[number]


@pytest.mark.thorough
def test_the_bank_of_the_readme_answers_a_mixed_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = lk.load_model("smollm2")
    for seed, name in enumerate(["places", "sql"]):
        attach_random(model, seed=seed, targets=("q", "v"))
        lk.extract(model).save(tmp_path / "out" / name)
        lk.detach(model)
    *_, program = blocks("python")
    found: dict[str, Any] = {}
    exec(compile(program, "README.md", "exec"), found)
    assert found["answers"].shape[0] == 3
    assert found["bank"].names == ("places", "sql")


def commands(page):
    """The words of each lorakit command in a page's shell blocks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
        words = shlex.split(block.replace("\\\n", " "), comments=True)
        starts = [at for at, word in enumerate(words) if word == "lorakit"]
        for start, stop in itertools.pairwise([*starts, len(words)]):
            yield words[start:stop]


COMMANDS = [*commands("README.md"), *commands("docs/methods.md")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_readme_and_methods_are_valid(words, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main([*words[1:], "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "settings", sorted((ROOT / "benchmarks").glob("methods_*.yaml")), ids=lambda p: p.stem
)
def test_the_settings_of_the_comparisons_are_valid(settings, capsys):
    assert main(["bench", "methods", str(settings), "--print-config"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_examples_are_valid(example, capsys):
    assert main(["train", str(example), "--print-config"]) == 0, capsys.readouterr().err


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data sets beside the repository")
@pytest.mark.parametrize("name", ["e2e", pytest.param("sst2", marks=pytest.mark.thorough)])
def test_the_examples_read_the_real_rows(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["train", f"examples/{name}.yaml", "--data.train-rows", "40", "--dry-run", "--json"]
    assert main(words) == 0
    assert '"rows":40' in capsys.readouterr().out.replace(" ", "")
