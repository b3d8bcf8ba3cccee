"""The settings of a verb: those of a YAML file, overridden by flags, validated as a whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lorakit.cli.parsing import strict_yaml
from lorakit.cli.parsing.flags import Key, read_flags, section_of
from lorakit.config.base import Settings, config_error
from lorakit.errors import ConfigError

S = TypeVar("S", bound=Settings)


def parse(settings: type[S], argv: Sequence[str]) -> S:
    """A verb's settings from its command line: the words after the verb.

    A bare word, or --config FILE, names a YAML file. A flag overrides one setting of the file, in
    a section too: --lora.rank 4 leaves the file's lora.targets as they are. A list or a mapping
    replaces the one before it.

    Raises:
        ConfigError: the file cannot be read; or settings, of the file or of the flags, are
            unknown, missing or wrong: all of them in one message.
    """
    files, flags = read_flags(settings, argv)
    if len(files) > 1:
        raise ConfigError(
            f"one configuration file is read, but {len(files)} words stand alone: "
            f"{', '.join(files)}. A setting is given as --name VALUE."
        )
    values = _section_defaults(settings)
    for file in files:
        _overlay(values, strict_yaml.read_mapping(Path(file).expanduser()), settings)
    for key, value in flags.items():
        _put(values, key, value)
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise config_error(settings, error) from None


def to_yaml(settings: Settings) -> str:
    """All settings as YAML that `parse` reads back as the same settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


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
