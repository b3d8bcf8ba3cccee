"""Private names of other libraries: all are there, and all are in one module and its table."""

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path

import accelerate
import pytest
import torch
import transformers

import lorakit
from lorakit.upstream.reasons import PRIVATE, PrivateName
from references import checkpoint_blocks
from tiny_models import build

SOURCE = Path(lorakit.__file__).parent
HOME = SOURCE / "upstream" / "private_names.py"
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors", "bitsandbytes", "peft", "triton")


def checkpointed_block():
    model = build("llama")
    checkpoint_blocks(model)
    return model.model.layers[0]


def hooked_module():
    return accelerate.hooks.add_hook_to_module(torch.nn.Module(), accelerate.hooks.ModelHook())


INSTANCES = {
    "torch.nn.Module": torch.nn.Module,
    "accelerate.hooks.ModelHook": hooked_module,
    "torch._dynamo.OptimizedModule": lambda: torch.compile(torch.nn.Linear(1, 1), backend="eager"),
    "torch._ops.OpOverload": lambda: torch.ops.aten.mm.default,
    "transformers.PreTrainedConfig": transformers.PreTrainedConfig,
    "transformers.modeling_layers.GradientCheckpointingLayer": checkpointed_block,
}
"""Objects of the classes that have private names only in their instances."""


def resolve(path):
    """The module, class or object of a dotted path."""
    parts = path.split(".")
    found = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:end]))
        found = getattr(found, part)
    return found


def is_there(entry):
    """Whether the installed version has a private name."""
    try:
        owner = resolve(entry.owner)
    except (ImportError, AttributeError):
        return False
    return hasattr(owner, entry.name) or (
        entry.owner in INSTANCES and hasattr(INSTANCES[entry.owner](), entry.name)
    )


def lost(entries):
    """A line for each private name that the installed versions have no more."""
    return [
        f"{each.owner}.{each.name}, which {each.why}. Without it: {each.breaks}"
        for each in entries
        if not is_there(each)
    ]


def test_the_installed_versions_have_every_private_name():
    missing = lost(PRIVATE)
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, transformers, accelerate))
    assert not missing, "\n".join([f"lost in {versions}:", *missing])


def test_a_lost_name_is_told_with_its_reason():
    gone = [
        PrivateName("torch.Tensor", "_versions", "counts writes", "stale hashes"),
        PrivateName("torch._gone", "_name", "was there once", "all"),
    ]
    assert lost(gone) == [
        "torch.Tensor._versions, which counts writes. Without it: stale hashes",
        "torch._gone._name, which was there once. Without it: all",
    ]


def test_every_entry_is_different_and_says_why():
    assert len({(each.owner, each.name) for each in PRIVATE}) == len(PRIVATE)
    assert all(each.why and each.breaks for each in PRIVATE)


def is_private(name):
    return name.startswith("_") and not name.startswith(("__", "_lorakit")) and name != "_"


def own_names(trees):
    """The names that lorakit defines itself, which other code of its own may use."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            match node:
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                ):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    found.add(name)
                case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                    found.add(name)
    return found


def library_roots(tree):
    """What a module calls the libraries, and what it imports from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (alias.asname or alias.name).partition(".")[0]
                for alias in node.names
                if alias.name.partition(".")[0] in LIBRARIES
            }
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def private_uses(tree, own):
    """Yield line and name of each private name of a library that a module uses.

    An attribute counts if lorakit defines no such name, or if it is read from a library's module,
    class or function. `super()._x` belongs to an override, which has a test of its own.
    """
    roots = library_roots(tree)
    for node in ast.walk(tree):
        names = []
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(value=value, attr=name):
                root = value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if name not in own or (isinstance(root, ast.Name) and root.id in roots):
                    names = [name]
            case ast.ImportFrom(module=str(module), names=imported):
                if module.partition(".")[0] in LIBRARIES:
                    names = [*module.split("."), *(alias.name for alias in imported)]
            case ast.Import(names=imported):
                names = [part for alias in imported for part in alias.name.split(".")]
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                names = [name] if name not in own else []
        yield from ((getattr(node, "lineno", 0), name) for name in names if is_private(name))


@cache
def trees():
    """The syntax tree of each module of lorakit."""
    return {path: ast.parse(path.read_text("utf-8")) for path in sorted(SOURCE.rglob("*.py"))}


@cache
def own():
    """The names that lorakit defines itself."""
    return own_names(trees().values())


def test_private_names_are_used_in_their_module_alone():
    uses = [
        f"{path.relative_to(SOURCE)}:{line}: {name}"
        for path, tree in trees().items()
        if path != HOME
        for line, name in private_uses(tree, own())
    ]
    assert not uses, "use or write a function of lorakit.upstream.private_names:\n" + "\n".join(
        uses
    )


def test_every_name_of_the_module_is_in_the_table():
    tree = trees()[HOME]
    known = {each.name for each in PRIVATE}
    known |= {part for each in PRIVATE for part in each.owner.split(".")}
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    written = {name for _, name in private_uses(tree, own())}
    written |= {text for text in constants if isinstance(text, str) and is_private(text)}
    assert written - known == set()


def overrides():
    """Yield class and name of what lorakit overrides of a library's private names."""
    for found in pkgutil.walk_packages(lorakit.__path__, "lorakit."):
        if found.name.endswith(("__main__", "_triton")):
            continue
        module = importlib.import_module(found.name)
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == found.name:
                for base in kind.__mro__[1:]:
                    if base.__module__.partition(".")[0] in LIBRARIES:
                        shared = vars(kind).keys() & vars(base).keys()
                        yield from ((base, name) for name in shared if is_private(name))


# Set by torch's metaclass in each autograd function, not by us.
MADE_BY_TORCH = {"_backward_cls"}
MADE_BY_PYTHON = {"_abc_impl"}


def test_every_override_is_in_the_table():
    table = {(resolve(each.owner), each.name) for each in PRIVATE}
    assert [(base, name) for base, name in overrides() if name not in MADE_BY_TORCH], (
        "there are some"
    )
    assert not {
        (base.__qualname__, name)
        for base, name in overrides()
        if name not in MADE_BY_TORCH | MADE_BY_PYTHON and (base, name) not in table
    }


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch._C._whatever()",
        "from torch._inductor import config",
        "import torch._inductor.config",
        "def f(module): return module._state_dict_hooks",
        "def f(config): return getattr(config, '_commit_hash', None)",
        "from torch import Tensor; Tensor._save",
    ],
)
def test_a_new_private_name_is_found(line):
    assert list(private_uses(ast.parse(line), own()))
