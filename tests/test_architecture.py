"""The shape of the source: which way imports point, and what importing lorakit does."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lorakit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lorakit"
MODULES = sorted(SOURCE.rglob("*.py"))


def flow() -> dict[str, int]:
    """Return each part's place in the flow that docs/design.md writes down, 0 at the top."""
    text = " ".join((ROOT / "docs" / "design.md").read_text(encoding="utf-8").split())
    written = re.search(r"Imports point one way: `([^`]+)`", text)
    assert written, "docs/design.md no longer says which way imports point"
    layers = written.group(1).split("→")
    return {part.strip(): place for place, layer in enumerate(layers) for part in layer.split(",")}


def part_of(module: Path) -> str:
    """Return the folder or the file right under src/lorakit that a module belongs to."""
    return module.relative_to(SOURCE).parts[0].removesuffix(".py")


PARTS = {part_of(module) for module in MODULES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of everything a tree imports, but for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{ast.unparse(node)}: write the import from lorakit on"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def imported_parts(source: str) -> set[str]:
    """Return the parts of lorakit that a module imports.

    The package itself is at the top of the flow, with cli, since it imports nearly all parts.
    """
    ours = (name.split(".") for name in imports(ast.parse(source)))
    named = {names[1] if len(names) > 1 else "" for names in ours if names[0] == "lorakit"}
    return {name if name in PARTS else "cli" for name in named}


def test_imports_are_found_wherever_they_stand():
    source = (
        "import lorakit.merge\n"
        "from lorakit.train.loss import x\n"
        "from lorakit import models\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lorakit.tasks import y\n"
        "def f():\n    from lorakit import attach\n"
    )
    assert imported_parts(source) == {"merge", "train", "models", "attach"}
    assert imported_parts("from lorakit import __version__") == {"cli"}


def test_every_part_has_its_place_in_the_flow():
    assert PARTS - {"__init__"} <= set(flow()), "docs/design.md must say where the new part stands"


def test_imports_point_one_way():
    places = flow()
    back = {
        f"{module.relative_to(SOURCE)} imports {part}"
        for module in MODULES
        for part in imported_parts(module.read_text(encoding="utf-8")) & set(places)
        if places[part] < places.get(part_of(module), 0)
    }
    assert not back, "against the flow of docs/design.md: " + ", ".join(sorted(back))


def test_modules_begin_with_their_idea_and_are_named_after_it():
    ideas = {m: ast.get_docstring(ast.parse(m.read_text(encoding="utf-8"))) for m in MODULES}
    assert [str(module.relative_to(SOURCE)) for module, idea in ideas.items() if not idea] == []
    unnamed = {"utils", "util", "helpers", "helper", "common", "misc"}
    parts = {module: set(module.relative_to(SOURCE).with_suffix("").parts) for module in MODULES}
    assert [str(module.relative_to(SOURCE)) for module in MODULES if parts[module] & unnamed] == []


def test_package_has_few_public_names_and_all_exist():
    assert len(lorakit.__all__) <= 25
    assert len(set(lorakit.__all__)) == len(lorakit.__all__)
    for name in lorakit.__all__:
        assert hasattr(lorakit, name)


IMPORT_AND_TELL = """
import json, logging, os, sys
import torch, transformers
def state():
    names = [None, *logging.root.manager.loggerDict]
    handlers = sum(len(logging.getLogger(name).handlers) for name in names)
    return handlers, logging.root.level, str(torch.get_default_dtype()), dict(os.environ)
before, modules = state(), set(sys.modules)
import lorakit
print(json.dumps({"unchanged": state() == before, "modules": sorted(set(sys.modules) - modules)}))
"""


def test_importing_lorakit_changes_nothing_and_needs_no_extra():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_TELL], check=True, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    roots = {name.partition(".")[0] for name in told["modules"]}
    assert told["unchanged"]
    assert "lorakit" in roots
    extras = {"datasets", "sacrebleu", "gguf", "matplotlib", "tensorboard", "peft", "bitsandbytes"}
    assert not roots & extras
    assert "lorakit.cli" not in told["modules"]
