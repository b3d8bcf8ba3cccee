"""What tests check in all of lorakit: the types of what functions are given, sizes if named."""

import importlib
import sys
from typing import Any

import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

PROGRAM = """
from __future__ import annotations
from typing import TYPE_CHECKING
import torch
from torch import Tensor
from jaxtyping import Float
if TYPE_CHECKING:
    from decimal import Decimal

def plain(count: int) -> str:
    return "a" if count else count

def shaped(x: Float[Tensor, "n d"], y: Float[Tensor, "d"] | None) -> list[Float[Tensor, "n"]]:
    return [x[:, 0]]

def unknown(count: int, other: Decimal) -> int:
    return count
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module that jaxtyping's hook treats as lorakit's."""
    hook: Any = next(each for each in sys.meta_path if type(each).__name__ == "_JaxtypingFinder")
    folder = tmp_path_factory.mktemp("checked")
    (folder / "shape_checked_example.py").write_text(PROGRAM)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(hook, "modules", [*hook.modules, "shape_checked_example"])
        yield importlib.import_module("shape_checked_example")
    del sys.modules["shape_checked_example"]


def test_types_of_functions_without_shapes_are_checked(functions):
    assert functions.plain(3) == "a"
    with pytest.raises(BeartypeCallHintViolation):
        functions.plain("three")
    with pytest.raises(BeartypeCallHintViolation):
        functions.plain(0)


def test_sizes_are_checked_wherever_they_are_named(functions):
    import torch

    functions.shaped(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeCheckError):
        functions.shaped(torch.ones(2, 3), torch.ones(2))
    with pytest.raises(TypeCheckError):
        functions.shaped(torch.ones(2), None)


def test_what_can_be_known_is_checked_where_a_name_cannot(functions):
    assert functions.unknown(3, object()) == 3
    with pytest.raises(TypeCheckError):
        functions.unknown("three", object())
