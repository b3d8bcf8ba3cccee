"""The settings of a verb: those of a YAML file, overridden by flags, validated as a whole."""

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lorakit.cli.parsing.flags import Flag, Given, flags_of, read_flags
from lorakit.config import strict_yaml
from lorakit.config.base import Settings, headline, problem_lines
from lorakit.config.fields import Key, section_of
from lorakit.errors import ConfigError

S = TypeVar("S", bound=Settings)
ROWS = "--data.train"
ROW_SUFFIXES = {".csv", ".gz", ".jsonl", ".ndjson", ".parquet", ".tsv"}
"""How the names of files of rows end, and no file of settings does."""


def parse(settings: type[S], argv: Sequence[str]) -> S:
    """A verb's settings from its command line: the words after the verb.

    A bare word is a YAML file, or one of the settings that the class names as positional;
    --config FILE is a YAML file whatever its name. A flag overrides one setting of the file, in a
    section too: --lora.rank 4 leaves the file's lora.targets as they are. A list or a mapping
    replaces the one before it.

    Raises:
        ConfigError: the file cannot be read; or settings, of the file, the words or the flags, are
            unknown, missing or wrong: all of them in one message.
    """
    given = read_flags(settings, argv)
    _place_words(given, settings)
    values = _section_defaults(settings)
    try:
        for file in given.files:
            _overlay(values, strict_yaml.read_mapping(Path(file).expanduser()), settings)
    except ConfigError as error:
        # What the file would have said is unknown, so nothing else can be validated.
        if not given.problems:
            raise
        raise ConfigError.listing(headline(settings), [str(error), *given.problems]) from None
    for key, value in given.values.items():
        _put(values, key, value)
    lines: list[str] = []
    try:
        found = settings.model_validate(values)
    except ValidationError as error:
        lines = problem_lines(settings, error, told=given.refused)
    if lines or given.problems:
        raise ConfigError.listing(headline(settings), [*lines, *given.problems])
    return found


def to_yaml(settings: Settings) -> str:
    """All settings as YAML that `parse` reads back as the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _place_words(given: Given, settings: type[Settings]) -> None:
    """Make each bare word a file or the value of a positional setting, or a problem, in place.

    A word right after a list, or after a flag that is unknown, that is no file was meant for that.
    """
    flags = {flag.name: flag for flag in flags_of(settings)}
    free = deque(settings.positional)
    strays: dict[str, list[str]] = {}
    for word in given.words:
        if _is_settings_file(word.text):
            given.files.append(word.text)
        elif word.after is not None and not Path(word.text).exists():
            strays.setdefault(word.after, []).append(word.text)
        elif free:
            name = free[0] if flags[_flag(free[0])].is_list else free.popleft()
            _give(given, flags[_flag(name)], word.text)
        elif settings.positional:
            given.problems.append(f"{word.text}: a word too many, {_what_words_mean(settings)}")
        elif ROWS in flags and Path(word.text).suffix in ROW_SUFFIXES:
            given.problems.append(f"{word.text}: a file of rows is given as {ROWS} {word.text}")
        else:
            given.files.append(word.text)
    for typed, texts in strays.items():
        flag = flags.get(typed.replace("_", "-"))
        if flag:
            values = ",".join([*map(str, given.values.get(flag.key) or ()), *texts])
            hint = f"did you mean {typed} {values}?"
            given.problems.append(f"{' '.join(texts)}: a list is one word; {hint}")
    if len(given.files) > 1:
        files = ", ".join(given.files)
        given.problems.append(
            f"{files}: one settings file is read; a setting is given as --NAME VALUE"
        )


def _is_settings_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and not Path(word).is_dir()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _give(given: Given, flag: Flag, text: str) -> None:
    """Give a positional setting its value; a list takes all words that are left."""
    if flag.is_list:
        given.values[flag.key] = [*given.values.get(flag.key, ()), text]
    elif flag.key in given.values:
        given.problems.append(f"{text}: {'.'.join(flag.key)} is given by {flag.name} too")
    else:
        given.values[flag.key] = text


def _what_words_mean(settings: type[Settings]) -> str:
    names = " and ".join(settings.positional)
    count = len(settings.positional)
    words = "a word without a flag gives" if count == 1 else "words without a flag give"
    return f"{words} {names}; a setting is given as --NAME VALUE"


def _section_defaults(settings: type[BaseModel]) -> dict[str, Any]:
    """The values that each section's default sets: one more setting in a section keeps them."""
    defaults = {
        name: field.get_default(call_default_factory=True)
        for name, field in settings.model_fields.items()
        if section_of(field) and not field.is_required()
    }
    return {
        name: default.model_dump(exclude_unset=True)
        for name, default in defaults.items()
        if default is not None
    }


def _overlay(values: dict[Any, Any], over: Mapping[Any, Any], settings: type[BaseModel]) -> None:
    """Override settings by others, in place: section by section, any other value as a whole."""
    for name, value in over.items():
        field = settings.model_fields.get(name)
        section = section_of(field) if field else None
        if section and isinstance(value, dict):
            _overlay(values.setdefault(name, {}), value, section)
        else:
            values[name] = value


def _put(values: dict[Any, Any], key: Key, value: Any) -> None:
    """Set one value in its section, in place.

    A section that is no mapping stays as it is, and validation refuses it.
    """
    for name in key[:-1]:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            return
    values[key[-1]] = value
