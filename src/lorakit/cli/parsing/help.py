"""Help: each verb's settings with their flags, defaults and meanings.

It does not use argparse's help, whose layout differs between Python versions and terminals:
docs/cli.md, made from this one, must be the same everywhere.
"""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lorakit.cli.overview import SWITCHES, WIDTH, listed
from lorakit.cli.parsing.flags import Flag
from lorakit.cli.verbs import VERBS
from lorakit.config.base import Settings
from lorakit.config.fields import Key, section_of
from lorakit.errors import ConfigError, did_you_mean

ALL = "all"
"""The topic that is every setting."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A setting in the help: its flag, the default of the class or section, and its meaning."""

    flag: Flag
    default: Any

    def __str__(self) -> str:
        flag = self.flag
        typed = f"--[no-]{flag.name[2:]}" if flag.is_boolean else f"{flag.name} {flag.kind}"
        fallback = "required" if flag.field.is_required() else f"default: {_word(self.default)}"
        first = _between_choices(f"{typed}  ({fallback})")
        return f"{first}\n{_wrapped(flag.field.description or '', indent=6)}\n"


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Settings under one heading; a verb's plain settings have no topic."""

    topic: str
    meaning: str
    entries: tuple[_Entry, ...]

    def __str__(self) -> str:
        heading = f"{self.topic}: {self.meaning}".strip() if self.topic else "settings:"
        return f"{heading}\n{''.join(map(str, self.entries))}"

    @property
    def names(self) -> str:
        """The flags of the group in one line."""
        return " ".join(entry.flag.name for entry in self.entries)


def verb_help(name: str, settings: type[Settings], topic: str | None = None) -> str:
    """The help of `lorakit NAME --help`, or of `lorakit NAME --help TOPIC`.

    Of a class with topics, the first is shown in full, and the rest by name.

    Args:
        name: the verb.
        settings: the class of its settings.
        topic: a topic, a section or a setting to show alone; "all": everything in full. None: what
            people need first.

    Raises:
        ConfigError: there is no such topic.
    """
    groups = list(_groups(settings))
    if topic not in (None, ALL):
        return _on_topic(name, groups, str(topic))
    first, *rest = groups
    body = "\n".join(map(str, groups))
    if settings.topics and topic is None:
        width = max(len(group.topic) for group in rest) + 2
        lines = "".join(listed(group.topic, group.names, width) for group in rest)
        body = (
            f"{first}\nThe rest by topic; lorakit {name} --help TOPIC explains them, "
            f"--help {ALL} everything:\n{lines}"
        )
    width = max(map(len, SWITCHES)) + 2
    switches = "".join(listed(switch, meaning, width) for switch, meaning in SWITCHES.items())
    return (
        f"usage: lorakit {name}{_words(settings)} [CONFIG.yaml] [--NAME VALUE ...]\n\n"
        f"{VERBS[name].meaning}\n\n"
        "Settings come from a YAML file (CONFIG.yaml or --config FILE); flags override it.\n\n"
        f"{body}\nevery verb:\n{switches}"
    )


def _words(settings: type[Settings]) -> str:
    """The settings that words without a flag give, as a usage line has them."""
    names = [name.upper() for name in settings.positional]
    return "".join(f" [{name}" for name in names) + "]" * len(names)


def _on_topic(name: str, groups: list[_Group], topic: str) -> str:
    """The help of one group, section or setting."""
    asked = topic.removeprefix("--").replace("-", "_")
    keys = [group for group in groups if asked in (group.topic, *_sections(group))]
    if keys:
        return "\n".join(map(str, keys))
    entries = {".".join(entry.flag.key): entry for group in groups for entry in group.entries}
    if asked in entries:
        return str(entries[asked])
    topics = [group.topic for group in groups if group.topic]
    hint = did_you_mean(asked, [*topics, *entries]) or f"; topics are {', '.join([*topics, ALL])}"
    raise ConfigError(f"lorakit {name} has no setting {topic!r}{hint}")


def _sections(group: _Group) -> set[str]:
    return {".".join(entry.flag.key[:-1]) for entry in group.entries} - {""}


def _groups(settings: type[Settings]) -> Iterator[_Group]:
    """The settings of a class by group, and those of each section that no group has."""
    entries = {entry.flag.key: entry for entry in _entries(settings, None)}
    for topic in settings.topics:
        chosen = tuple(entries.pop(tuple(name.split("."))) for name in topic.settings)
        yield _Group(topic=topic.name, meaning=topic.meaning, entries=chosen)
    plain = tuple(entries.pop(key) for key in list(entries) if len(key) == 1)
    if plain:
        yield _Group(topic="more" if settings.topics else "", meaning="", entries=plain)
    for section in dict.fromkeys(key[:-1] for key in entries):
        inside = tuple(entry for key, entry in entries.items() if key[:-1] == section)
        meaning = _meaning(settings, section)
        yield _Group(topic=".".join(section), meaning=meaning, entries=inside)


def _meaning(settings: type[BaseModel], section: Key) -> str:
    """The meaning of a section, as the class that has it says."""
    field = settings.model_fields[section[0]]
    inner = section_of(field)
    return _meaning(inner, section[1:]) if section[1:] and inner else field.description or ""


def _entries(
    settings: type[BaseModel], defaults: BaseModel | None, within: Key = ()
) -> Iterator[_Entry]:
    """The entries of a class's settings and of its sections.

    A section's defaults are those of the field's default object, if it has one, since that may set
    other values than its class.
    """
    for name, field in settings.model_fields.items():
        default = getattr(defaults, name) if defaults else field.get_default()
        key, section = (*within, name), section_of(field)
        if section:
            yield from _entries(section, default, key)
        else:
            yield _Entry(flag=Flag(key=key, field=field), default=default)


def _wrapped(text: str, *, indent: int) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=" " * indent,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _between_choices(line: str) -> str:
    """A flag's line; one that is too wide goes on below, after one of its choices."""
    spaced = textwrap.fill(
        # The default stays in one piece.
        line.replace("|", "| ").replace("default: ", "default:\N{NO-BREAK SPACE}"),
        WIDTH,
        initial_indent="  ",
        subsequent_indent=" " * 4,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return spaced.replace("| ", "|").replace("\N{NO-BREAK SPACE}", " ")


def _word(value: Any) -> str:
    """A default as it is typed on the command line; "empty" or "none" where there is no value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, dict):
        return "empty" if not value else str(value)
    if value is None:
        return "none"
    return str(value) if str(value).isprintable() and str(value) else repr(value)
