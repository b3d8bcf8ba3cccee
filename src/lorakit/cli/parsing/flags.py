"""Flags: one for each setting, and the parsing of a command line's words into values.

The grammar is smaller than argparse's: a flag takes exactly one word, a boolean none. So a mistyped
flag does not alter the meaning of the other words, and all mistakes are reported at once.
"""

import difflib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorakit.config import strict_yaml
from lorakit.config.fields import Key, fields_of, meant, types_of
from lorakit.config.marks import Escapes

_KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""The words that the help shows for a value, by type."""
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}
"""What stands for itself behind a backslash in a text that is marked so, and what it means."""


@dataclass(frozen=True, kw_only=True)
class Flag:
    """The flag of one setting."""

    key: Key
    """The path of the setting."""

    field: FieldInfo
    """The setting's type, default and meaning, from pydantic."""

    @property
    def name(self) -> str:
        """The flag as typed, such as --lora.rank-pattern."""
        return "--" + ".".join(self.key).replace("_", "-")

    @property
    def is_boolean(self) -> bool:
        """Whether the flag takes no value, and has a --no- form."""
        return set(types_of(self.field.annotation)) <= {bool, NoneType}

    @property
    def kind(self) -> str:
        """The word that the help shows for the value, such as N or linear|cosine."""
        kinds = (_kind(each) for each in types_of(self.field.annotation) if each is not NoneType)
        return "|".join(dict.fromkeys(kinds))

    @property
    def is_list(self) -> bool:
        """Whether the value is a list, as in q,v."""
        origins = {get_origin(each) for each in types_of(self.field.annotation)} - {None}
        return bool(origins) and origins <= {list, tuple}

    def parse(self, text: str) -> Any:
        """The value that a text stands for, or the text itself for pydantic to validate."""
        types = types_of(self.field.annotation)
        if NoneType in types and text.lower() in ("none", "null"):
            return None
        origins = {get_origin(each) for each in types if each is not NoneType}
        if dict in origins:
            return _from_yaml(text, dict | list if list in origins else dict)
        if origins <= {list, tuple}:
            return [part.strip() for part in text.split(",") if part.strip()]
        if any(isinstance(mark, Escapes) for mark in self.field.metadata):
            return re.sub(r"\\(.)", lambda found: _ESCAPED.get(found[1], found[0]), text)
        return text


@dataclass(frozen=True)
class Word:
    """A word of a command line that is neither a flag nor the value of one."""

    text: str
    after: str | None = None
    """The flag right before it, of a list or unknown: perhaps it was to be one of its values."""


@dataclass
class Given:
    """The content of a command line: words, values, and the problems of its flags."""

    files: list[str] = field(default_factory=list)
    """The files of --config."""
    words: list[Word] = field(default_factory=list)
    values: dict[Key, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    refused: set[Key] = field(default_factory=set)
    """The settings that a problem is about, so that it is not told again."""


def flags_of(settings: type[BaseModel]) -> list[Flag]:
    """The flags of a class's settings and of its sections, in the order of the class."""
    return [Flag(key=key, field=field) for key, field in fields_of(settings)]


def read_flags(settings: type[BaseModel], argv: Sequence[str]) -> Given:
    """The content of a command line; a repeated flag overrides."""
    flags = {".".join(flag.key): flag for flag in flags_of(settings)}
    given = Given()
    left = deque(argv)
    before = None
    while left:
        word = left.popleft()
        if not word.startswith("-"):
            given.words.append(Word(word, after=before))
        elif word.startswith("--config="):
            given.files.append(word.removeprefix("--config="))
        elif word == "--config":
            if left:
                given.files.append(left.popleft())
            else:
                given.problems.append("--config: needs the name of a YAML file")
        else:
            before = _read_flag(word, left, flags, settings, given)
    return given


def _read_flag(
    word: str,
    left: deque[str],
    flags: Mapping[str, Flag],
    settings: type[BaseModel],
    given: Given,
) -> str | None:
    """Read one flag, taking its value from the words that are left.

    Returns the flag, if words right after it may have been meant as values of it.
    """
    name, equals, text = word.removeprefix("--").partition("=")
    dotted = name.replace("-", "_")
    flag = flags.get(dotted) or flags.get(dotted.removeprefix("no_"))
    if flag and flag.is_boolean and not equals:
        given.values[flag.key] = dotted in flags
        return None
    flag = flags.get(dotted)
    typed = word.partition("=")[0]
    takes_word = not equals and not _is_nearly_boolean(dotted, flags)
    lacks_word = takes_word and (not left or left[0].startswith("--"))
    if takes_word and not lacks_word:
        text = left.popleft()
    if not flag:
        given.problems.append(f"{typed}: unknown setting{_hint(settings, dotted)}")
    elif lacks_word:
        given.problems.append(f"{typed}: needs a value ({flag.kind})")
        given.refused.add(flag.key)
    else:
        given.values[flag.key] = flag.parse(text)
    listed = flag is None or flag.is_list
    return typed if listed and (takes_word or equals) else None


def _hint(settings: type[BaseModel], dotted: str) -> str:
    """The end of the message about an unknown flag: those that it may mean."""
    likely = meant(settings, dotted.removeprefix("no_"))
    names = (f"--{each.replace('_', '-')}" for each in likely)
    return f"; did you mean {' or '.join(names)}?" if likely else "; --help lists the known ones"


def _is_nearly_boolean(dotted: str, flags: Mapping[str, Flag]) -> bool:
    """Whether an unknown flag looks like a mistyped boolean, which takes no word."""
    nearest = difflib.get_close_matches(dotted, flags, n=1)
    return dotted not in flags and bool(nearest) and flags[nearest[0]].is_boolean


def _kind(type_: Any) -> str:
    """The word that stands for a value of a type."""
    origin = get_origin(type_)
    if origin is Literal:
        return "|".join(map(str, get_args(type_)))
    if origin is dict:
        return "'{NAME: VALUE}'"
    if origin is list and get_args(type_)[0] is Any:
        return "'[{NAME: VALUE}, …]'"
    if origin in (list, tuple):
        return f"{_KINDS.get(get_args(type_)[0], 'TEXT')},…"
    return _KINDS.get(type_, "TEXT")


def _from_yaml(text: str, kind: Any) -> Any:
    """A text parsed as YAML, or the text itself where the result is of another type."""
    try:
        value = strict_yaml.load(text)
    except (yaml.YAMLError, ValueError):
        return text
    return value if isinstance(value, kind) else text
