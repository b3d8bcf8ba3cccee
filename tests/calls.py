"""The Python functions that an action calls, seen by a profile hook."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import lorakit

SOURCE = lorakit.__file__.removesuffix("__init__.py")


class Call(NamedTuple):
    """A call of a function, or a generator that goes on."""

    file: str
    """The function's file within lorakit; empty: it is not of lorakit."""
    function: str
    caller: str
    """The file of lorakit that it was called from, also through wrappers and libraries."""


def calls_in(action: Callable[[], Any]) -> list[Call]:
    """Every call within an action, in order."""
    found: list[Call] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            found.append(Call(_file(frame), frame.f_code.co_name, _caller(frame)))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
    return found


def _file(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    return name.removeprefix(SOURCE) if name.startswith(SOURCE) else ""


def _caller(frame: FrameType) -> str:
    outer = frame.f_back
    while outer is not None and not _file(outer):
        outer = outer.f_back
    return "" if outer is None else _file(outer)
