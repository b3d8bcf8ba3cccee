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


NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e-\d+)?")


# The tiny model has 32 positions, so that the prompt is cut and the answer has little room.
@pytest.mark.filterwarnings("ignore:.*(cut|less room):UserWarning")
def test_the_ten_lines_of_the_readme_run(tiny_llama, tmp_path, monkeypatch, capsys):
    """On a tiny model, and for two steps: what is printed has the words that README has."""
    monkeypatch.chdir(tmp_path)
    run_shortened(block("progress=True"), {'"smollm2"': repr(str(tiny_llama)), "=60": "=2"})
    printed, said = capsys.readouterr().out.splitlines(), blocks("text")[0].splitlines()
    assert [NUMBER.sub("#", line) for line in printed[:2]] == [
        NUMBER.sub("#", line) for line in said[:2]
    ]


@pytest.mark.filterwarnings("ignore:.*(cut|less room):UserWarning")
def test_the_verbs_of_the_readme_run(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = {"steps=70": f"steps=2, model={str(tiny_llama)!r}", "rows=32": "rows=2"}
    run_shortened(block("lk.evaluate"), short)
    assert "exact_match" in capsys.readouterr().out


def block(words):
    """The one Python block with some words."""
    (found,) = (each for each in blocks("python") if words in each)
    return found


def run_shortened(program, short):
    """Run a program with some of its words replaced, each of which it has once."""
    for written, replaced in short.items():
        assert program.count(written) == 1
        program = program.replace(written, replaced)
    exec(compile(program, "README.md", "exec"), {})


@pytest.mark.thorough
def test_the_ten_lines_of_the_readme_print_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_shortened(block("progress=True"), {})
    trained, merged, answer = capsys.readouterr().out.splitlines()
    said = blocks("text")[0].splitlines()
    assert answer == said[2]
    # Rounding differs between processors, and a run of some steps with it.
    assert _numbers(trained + merged) == pytest.approx(_numbers(said[0] + said[1]), rel=0.5)


def _numbers(text):
    return [float(found[0].replace(",", "")) for found in NUMBER.finditer(text)]


def test_the_methods_of_the_readme_print_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_shortened(block("LoRA+PL"), {})
    assert capsys.readouterr().out == blocks("text")[1]


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


PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
COMMANDS = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_of_readme_and_docs_are_valid(words, monkeypatch, capsys):
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
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["e2e", "sst2"])
def test_the_examples_read_the_real_rows(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = ["train", f"examples/{name}.yaml", "--data.train-rows", "40", "--dry-run", "--json"]
    assert main(words) == 0
    assert '"rows":40' in capsys.readouterr().out.replace(" ", "")
