"""Parameters of a child that a module's own code reads, without calling the child.

No list of architectures says this: the code does. Mamba's mixer multiplies with
`self.dt_proj.weight`, WavLM's attention hands the weights of its projections to torch, and so does
torch's own encoder layer.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from lorakit.models.base import base_modules
from lorakit.upstream.private_names import own_parameters

PARAMETERS = ("weight", "bias")
FACTS = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad"})
"""What code asks a weight for without using its values."""
QUESTIONS = ("isinstance", "hasattr", "getattr", "id")
"""Functions that ask something of a weight without using its values."""
KNOWS_INTEGERS = "uint8"
"""What code names that knows of weights in few bits."""
NOT_FORWARD = ("init", "reset", "tie", "set_", "save", "load", "resize", "from_")
"""How the names of methods begin that prepare a module and are no part of a forward pass."""


def read_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters that code of the modules around them reads, by the path of their module."""
    modules = dict(base_modules(model))
    found: dict[str, tuple[str, ...]] = {}
    for path, module in modules.items():
        for child in _uses_of(type(module)).read:
            full = f"{path}.{child}" if path else child
            own = own_parameters(modules[full]) if full in modules else {}
            # Who reads one of them computes what a call would, and needs the other too.
            names = tuple(name for name in PARAMETERS if own.get(name) is not None)
            if names:
                found[full] = names
    return found


def only_read(model: nn.Module) -> frozenset[str]:
    """The paths of the modules whose parameters are read, and which no code around them calls."""
    called = {
        f"{path}.{child}" if path else child
        for path, module in base_modules(model)
        for child in _uses_of(type(module)).called
    }
    return frozenset(read_weights(model).keys() - called)


def giving_precision(model: nn.Module) -> frozenset[str]:
    """The paths of the modules whose weight's precision code around them asks for.

    T5 and its kin bring an input to that of `wo`, which must not be one of integers.
    """
    return frozenset(
        f"{path}.{child}" if path else child
        for path, module in base_modules(model)
        for child in _uses_of(type(module)).precise
    )


@dataclass(frozen=True)
class Uses:
    """The children that methods of a class read or call, by their dotted names."""

    read: frozenset[str]
    """Children whose parameters are read."""
    called: frozenset[str]
    """Children that are called, or given to somebody who may."""
    precise: frozenset[str]
    """Children whose weight's precision is asked for, in code that does not know of integers."""


_KNOWN: dict[type[nn.Module], Uses] = {}


def _uses_of(kind: type[nn.Module]) -> Uses:
    if kind not in _KNOWN:
        _KNOWN[kind] = _found_in(kind)
    return _KNOWN[kind]


def _found_in(kind: type[nn.Module]) -> Uses:
    found: dict[str, Any] = {}
    for each in kind.__mro__:
        if each not in (nn.Module, object):
            found = dict(vars(each)) | found
    codes = [
        code
        for name, value in found.items()
        if not name.lstrip("_").startswith(NOT_FORWARD)
        for code in _codes(value, set())
    ]
    uses = [use for code in codes for use in _uses_in(code)]
    by_kind = {kind: frozenset(child for child, own in uses if own == kind) for kind in _KINDS}
    return Uses(**by_kind)


_KINDS = ("read", "called", "precise")


def _codes(value: Any, seen: set[int]) -> Iterator[CodeType]:
    """Yield the code of a function, of those that decorators hide, and of those inside."""
    value = getattr(value, "__func__", value)
    if not isinstance(value, FunctionType) or id(value) in seen:
        return
    seen.add(id(value))
    yield from _with_inner(value.__code__)
    for cell in value.__closure__ or ():
        try:
            yield from _codes(cell.cell_contents, seen)
        except ValueError:  # A cell that is still empty.
            continue


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _uses_in(code: CodeType) -> Iterator[tuple[str, str]]:
    """Yield each dotted name after `self` in code, and how it is used."""
    knows = KNOWS_INTEGERS in code.co_names
    before: Any = None
    chain: list[str] | None = None
    asked = False
    for step in (*dis.get_instructions(code), None):
        operation: str = "" if step is None else step.opname
        name: Any = None if step is None else step.argval
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(str(name))
            continue
        if chain and not operation.startswith(("STORE", "DELETE")) and not asked:
            yield from (use for use in _use(chain) if not (knows and use[1] == "precise"))
        loads = operation.startswith(("LOAD_FAST", "LOAD_DEREF"))
        # One instruction may load two variables, the second of which is on top.
        is_self = loads and (name == "self" or (isinstance(name, tuple) and name[-1] == "self"))
        chain, asked = ([] if is_self else None), before in QUESTIONS
        before = name if operation == "LOAD_GLOBAL" else None


def _use(chain: Sequence[str]) -> Iterator[tuple[str, str]]:
    at = next((i for i, part in enumerate(chain) if part in PARAMETERS), None)
    if at is None:
        yield ".".join(chain), "called"
    elif at and (at + 1 == len(chain) or chain[at + 1] not in FACTS):
        yield ".".join(chain[:at]), "read"
    elif at and chain[at : at + 2] == ["weight", "dtype"]:
        yield ".".join(chain[:at]), "precise"
