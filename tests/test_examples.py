"""The example in the docstring of each public name runs, and prints what it says."""

import doctest
import inspect

import pytest
import torch

import lorakit as lk
from references import attach_random

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def base():
    """The model that the examples have, loaded once, and its tokenizer."""
    return lk.load_model("smollm2")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Where the examples run: out/places and out/sql are there."""
    made = tmp_path_factory.mktemp("examples")
    model, _ = base
    for seed, task in enumerate(["places", "sql"]):
        attach_random(model, seed=seed, std=0.02, targets=("q", "v"))
        lk.extract(model).save(made / "out" / task)
        lk.detach(model)
    return made


LONG = (
    *(
        "Adapter",
        "AdapterBank",
        "MergeReport",
        "attached",
        "evaluate",
        "generate",
        "merge",
        "merged",
        "route",
    ),
    *("sweep", "switch", "train", "unmerge"),
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.thorough if n in LONG else ()) for n in lk.__all__]
)
def test_the_example_of_each_public_name_runs(name, base, folder, monkeypatch):
    run_example(f"lk.{name}", getattr(lk, name), base, folder, monkeypatch)


FUNCTIONS = [name for name in lk.analysis.__all__ if inspect.isfunction(getattr(lk.analysis, name))]
LONG_ANALYSES = ("traces", "intruders", "from_checkpoint", "amplification")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.thorough if n in LONG_ANALYSES else ()) for n in FUNCTIONS],
)
def test_the_example_of_each_analysis_runs(name, base, folder, monkeypatch):
    run_example(f"lk.analysis.{name}", getattr(lk.analysis, name), base, folder, monkeypatch)


def run_example(name, public, base, folder, monkeypatch):
    """Run the example of a public name where out/places and out/sql are."""
    monkeypatch.chdir(folder)
    model, tokenizer = base
    names = {"lk": lk, "model": model, "tokenizer": tokenizer, "torch": torch}
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(public) or "", names, name, None, None
    )
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=printed.append)
    if any("@" in child for child, _ in model.named_modules()):
        lk.detach(model)
    assert not printed, "".join(printed)
