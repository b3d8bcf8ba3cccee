"""Each settings file in examples/ is trained as it is written, for two steps, on its own base."""

import json
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.config.strict_yaml import read_mapping
from tools.environments import run

ROOT = Path(__file__).parents[1]
PACKAGE_OF = {"nko": "detransliterator"}
"""The package that has the base of an example, where one has."""
FILES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the examples are, with what is beside the repository."""
    folder = tmp_path_factory.mktemp("clone")
    made = folder / "lorakit"
    made.mkdir()
    (made / "examples").symlink_to(ROOT / "examples")
    if (ROOT.parent / "shared").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return made


def make_base(name, place):
    """Make the base of an example, where a program does so, with the package that it is from."""
    program = ROOT / "examples" / "bases" / f"{name}.py"
    if program.exists():
        run(PACKAGE_OF.get(name), program, place / "out" / name, cwd=place)


@pytest.mark.thorough
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_trains_as_it_is_written(file, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    make_base(file.stem, place)
    settings = read_mapping(file)
    data = settings["data"]
    if data["train"].startswith("../") and not Path(data["train"]).exists():
        pytest.skip(f"needs {data['train']} beside the repository")
    words = ["train", f"examples/{file.name}", "--steps", "2", "--eval-every", "none"]
    words += ["--warmup-steps", "0", "--json"]
    if "validation" in data:
        words += ["--data.validation-rows", "8"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["out"] == settings["out"]
