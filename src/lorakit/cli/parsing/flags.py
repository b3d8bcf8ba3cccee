"""Flags: one for each setting, and the parsing of a command line's words into values.

The grammar is smaller than argparse's: a flag takes exactly one word, a boolean none. So a mistyped
flag does not alter the meaning of the other words, and all mistakes are reported at once.
"""

import difflib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorakit.cli.parsing import strict_yaml
from lorakit.errors import ConfigError

Key = tuple[str, ...]
"""The path of a setting: the names of its sections, then its own, as in ("lora", "rank")."""

_KINDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""The words that the help shows for a value, by type."""


class NoValue:
    """The value of a flag whose value was left out; validation reports it with other mistakes."""

    def __repr__(self) -> str:
        return "no value"


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
        return set(_types(self.field.annotation)) <= {bool, NoneType}

    @property
    def kind(self) -> str:
        """The word that the help shows for the value, such as N or linear|cosine."""
        kinds = (_kind(each) for each in _types(self.field.annotation) if each is not NoneType)
        return "|".join(dict.fromkeys(kinds))

    def parse(self, text: str) -> Any:
        """The value that a text stands for, or the text itself for pydantic to validate."""
        types = _types(self.field.annotation)
        if NoneType in types and text.lower() in ("none", "null"):
            return None
        origins = {get_origin(each) for each in types if each is not NoneType}
        if dict in origins:
            return _from_yaml(text, dict | list if list in origins else dict)
        if origins <= {list, tuple}:
            return [part.strip() for part in text.split(",") if part.strip()]
        return text


def flags_of(settings: type[BaseModel], within: Key = ()) -> list[Flag]:
    """The flags of a class's settings and of its sections, in the order of the class."""
    flags = []
    for name, field in settings.model_fields.items():
        section = section_of(field)
        key = (*within, name)
        flags += flags_of(section, key) if section else [Flag(key=key, field=field)]
    return flags


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The class of the settings that a field nests, or None for a plain value."""
    for each in _types(field.annotation):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def read_flags(settings: type[BaseModel], argv: Sequence[str]) -> tuple[list[str], dict[Key, Any]]:
    """The bare words of a command line, and the values of its flags; a repeated flag overrides.

    Mistakes are among the values: an unknown flag under a key that no setting has, a value left
    out as NoValue. So validation refuses them together with wrong values. --config FILE is the
    same as the bare word FILE.

    Raises:
        ConfigError: --config is the last word, without a file.
    """
    flags = {".".join(flag.key): flag for flag in flags_of(settings)}
    words: list[str] = []
    values: dict[Key, Any] = {}
    left = deque(argv)
    while left:
        word = left.popleft()
        if not word.startswith("-"):
            words.append(word)
        elif word.startswith("--config="):
            words.append(word.removeprefix("--config="))
        elif word == "--config":
            if not left:
                raise ConfigError("--config needs the name of a YAML file")
            words.append(left.popleft())
        else:
            key, value = _read_flag(word, left, flags, settings)
            values[key] = value
    return words, values


def _read_flag(
    word: str, left: deque[str], flags: Mapping[str, Flag], settings: type[BaseModel]
) -> tuple[Key, Any]:
    """The key and the value of one flag, taking the value from the words that are left."""
    name, equals, text = word.removeprefix("--").partition("=")
    dotted = name.replace("-", "_")
    flag = flags.get(dotted) or flags.get(dotted.removeprefix("no_"))
    if flag and flag.is_boolean and not equals:
        return flag.key, dotted in flags
    flag = flags.get(dotted)
    if not equals and not _is_nearly_boolean(dotted, flags):
        if not left or left[0].startswith("--"):
            return flag.key if flag else _unknown_key(settings, name), NoValue()
        text = left.popleft()
    return (flag.key, flag.parse(text)) if flag else (_unknown_key(settings, name), text)


def _is_nearly_boolean(dotted: str, flags: Mapping[str, Flag]) -> bool:
    """Whether an unknown flag looks like a mistyped boolean, which takes no word."""
    nearest = difflib.get_close_matches(dotted, flags, n=1)
    return dotted not in flags and bool(nearest) and flags[nearest[0]].is_boolean


def _unknown_key(settings: type[BaseModel], name: str) -> Key:
    """The key of an unknown flag: in the section that it names, where no setting has this key."""
    first, _, rest = name.partition(".")
    known = first.replace("-", "_")
    if known not in settings.model_fields:
        return (first,)
    section = section_of(settings.model_fields[known])
    return (known, *_unknown_key(section, rest)) if section and rest else (name,)


def _types(annotation: Any) -> list[Any]:
    """The members of a union, such as A and None of A | None; of any other type, the type."""
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [each for part in get_args(annotation) for each in _types(part)]
    return [annotation]


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
