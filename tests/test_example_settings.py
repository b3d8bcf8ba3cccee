"""Each settings file in examples/ is trained as it is written, for two steps, and tiny_bases.py."""

import importlib.util
import json
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.config.strict_yaml import read_mapping

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the examples are, with the tiny bases and what is beside the repository."""
    folder = tmp_path_factory.mktemp("clone")
    made = folder / "lorakit"
    made.mkdir()
    (made / "examples").symlink_to(ROOT / "examples")
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    file = ROOT / "examples" / "tiny_bases.py"
    spec = importlib.util.spec_from_file_location("tiny_bases", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(made / "out" / "tiny")
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_trains_as_it_is_written(file, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    data = read_mapping(file)["data"]
    if data["train"].startswith("../") and not Path(data["train"]).exists():
        pytest.skip(f"needs {data['train']} beside the repository")
    words = ["train", f"examples/{file.name}", "--steps", "2", "--eval-every", "none"]
    words += ["--warmup-steps", "0", "--json"]
    if "validation" in data:
        words += ["--data.validation-rows", "8"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["out"] == f"out/{file.stem}"
