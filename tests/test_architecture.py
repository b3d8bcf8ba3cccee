"""The shape of the source: its rooms, which way imports point, and what importing it does."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorakit
import rooms
from imports import Graph, circles, graph_of

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorakit"
MODULES = sorted(SOURCE.rglob("*.py"))

STEPS = {room: number for number, step in enumerate(rooms.FLOW) for room in step}
"""The place of each room in the flow, 0 at the top."""


@cache
def package_graph() -> Graph:
    """What the modules of lorakit import of each other."""
    return graph_of(SOURCE)


def room_of(module: str) -> str:
    """The folder or the file right under src/lorakit that a module belongs to."""
    room = module.removeprefix("lorakit").removeprefix(".").partition(".")[0]
    return room.removesuffix("__main__")


def between_rooms(graph: Graph) -> Graph:
    """The imports of one room from another; the package itself is no room."""
    found: dict[str, set[str]] = {room_of(module): set() for module in graph}
    for module, imported in graph.items():
        found[room_of(module)] |= {room_of(other) for other in imported} - {room_of(module), ""}
    return {room: frozenset(others) for room, others in found.items() if room}


def write_package(folder: Path, modules: dict[str, str]) -> Path:
    package = folder / "lorakit"
    for name, text in modules.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return package


def test_circles_are_found_inside_functions_and_across_folders(tmp_path):
    # The two that this package once had: each with one of its imports inside a function.
    package = write_package(
        tmp_path,
        {
            "__init__": "",
            "adapter": "def load():\n    from lorakit.formats.folder import load_path\n",
            "formats/__init__": "",
            "formats/folder": "from lorakit.formats.record import Record\n",
            "formats/record": "from lorakit.adapter import Adapter\n",
            "layers": "from lorakit.weight import is_quantized\n",
            "weight": "def dequantized():\n    from lorakit import layers\n",
            "alone": "import lorakit.layers\n",
        },
    )
    assert circles(graph_of(package)) == [
        ["lorakit.adapter", "lorakit.formats.folder", "lorakit.formats.record"],
        ["lorakit.layers", "lorakit.weight"],
    ]


def test_imports_for_type_checkers_do_not_count(tmp_path):
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lorakit import b\n"
    package = write_package(tmp_path, {"__init__": "", "a": text, "b": "import lorakit.a\n"})
    graph = graph_of(package)
    assert graph["lorakit.a"] == frozenset()
    assert graph["lorakit.b"] == {"lorakit.a"}


def test_no_modules_import_each_other_in_a_circle():
    assert circles(package_graph()) == []


def test_no_rooms_import_each_other_in_a_circle():
    assert circles(between_rooms(package_graph())) == []


def test_every_room_has_one_place_in_the_flow_and_on_the_map():
    assert sorted(STEPS) == sorted(rooms.READING_ORDER) == rooms.rooms()


def test_imports_point_one_way():
    back = [
        f"{room} imports {other}"
        for room, others in between_rooms(package_graph()).items()
        for other in others
        if STEPS[other] < STEPS[room]
    ]
    assert not back, "see the flow in docs/rooms.py"


def test_only_the_command_line_imports_the_package_itself():
    assert {room_of(name) for name, others in package_graph().items() if "lorakit" in others} <= {
        "cli"
    }


def test_the_map_in_the_pages_is_that_of_the_source():
    for name in rooms.PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert rooms.BLOCK.findall(text) == [rooms.page_block()], f"{name}: run `make docs`"


def test_no_room_is_called_like_a_public_function():
    # `lorakit.merge` would be a module or a function, whichever was imported last.
    functions = {name for name in lorakit.__all__ if inspect.isroutine(getattr(lorakit, name))}
    assert functions >= {"merge", "train", "generate"}
    assert not functions & set(rooms.rooms())


def test_modules_begin_with_their_idea_and_are_named_after_it():
    silent = [m for m in MODULES if not ast.get_docstring(ast.parse(m.read_text("utf-8")))]
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    named = [m for m in MODULES if vague & set(m.relative_to(SOURCE).with_suffix("").parts)]
    assert (silent, named) == ([], [])


def test_no_two_classes_have_one_name():
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for node in ast.parse(module.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(module.relative_to(SOURCE)))
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    assert not shared, "a word has one meaning: rename one of each"


def test_at_most_three_modules_are_loose():
    loose = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py"}
    assert len(loose) <= 3


def test_the_folder_list_alone_says_where_things_are():
    def homes(word):
        return {str(m.parent.relative_to(SOURCE)) for m in MODULES if word in m.stem}

    assert (homes("pissa"), homes("resume")) == ({"methods/lora"}, {"training"})
    named = ("Rows choose adapters", "one file a method", "PEFT's file format")
    found = [[room for room in rooms.rooms() if words in rooms.idea(room)] for words in named]
    assert found == [["routing"], ["methods"], ["adapter"]]


def test_package_has_few_public_names_and_all_exist():
    assert len(lorakit.__all__) <= 36
    assert len(set(lorakit.__all__)) == len(lorakit.__all__)
    for name in lorakit.__all__:
        assert hasattr(lorakit, name)
    assert set(lorakit.__all__) <= set(dir(lorakit))
    with pytest.raises(AttributeError, match="'lorakit' has no attribute 'open_model'"):
        _ = lorakit.open_model


def test_type_checkers_are_told_the_names_that_there_are():
    tree = ast.parse((SOURCE / "__init__.py").read_text("utf-8"))
    told = {
        alias.asname: f"{statement.module}.{alias.name}"
        for statement in ast.walk(tree)
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
        if alias.asname == alias.name
    }
    assert sorted(told) == lorakit.__all__
    for name, place in told.items():
        module, _, leaf = place.rpartition(".")
        assert getattr(lorakit, name) is getattr(importlib.import_module(module), leaf), name


IMPORT_AND_TELL = """
import json, logging, os, sys
import torch, transformers
def state():
    names = [None, *logging.root.manager.loggerDict]
    handlers = sum(len(logging.getLogger(name).handlers) for name in names)
    return handlers, logging.root.level, str(torch.get_default_dtype()), dict(os.environ)
before, modules = state(), set(sys.modules)
import lorakit
unchanged = state() == before
# transformers' own Trainer imports PEFT
trainer = {"train", "estimate", "sweep", "evaluate", "generate", "predict", "serve", "SaveAdapter"}
for name in set(lorakit.__all__) - trainer:
    getattr(lorakit, name)
print(json.dumps({"unchanged": unchanged, "modules": sorted(set(sys.modules) - modules)}))
"""


@pytest.mark.thorough
def test_importing_lorakit_changes_nothing_and_needs_no_extra():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_TELL], check=True, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    roots = {name.partition(".")[0] for name in told["modules"]}
    assert told["unchanged"]
    assert "lorakit" in roots
    extras = {"datasets", "sacrebleu", "gguf", "matplotlib", "tensorboard", "peft", "bitsandbytes"}
    assert not roots & (extras | {"liger_kernel"})
    assert "lorakit.cli" not in told["modules"]


def test_importing_lorakit_alone_loads_nothing_heavy():
    program = "import sys, lorakit; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(done.stdout.split())


def test_no_module_has_the_name_of_what_its_package_gives():
    packages = [file.parent for file in MODULES if file.name == "__init__.py"]
    taken = {}
    for package in packages:
        name = ".".join(("lorakit", *package.relative_to(SOURCE).parts))
        given = getattr(importlib.import_module(name), "__all__", ())
        taken[name] = {each for each in given if (package / f"{each}.py").exists()}
    assert not {name: names for name, names in taken.items() if names - {"errors"}}
