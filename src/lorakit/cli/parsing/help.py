"""Help: the verbs, and each verb's settings with their defaults and meanings.

It does not use argparse's help, whose layout differs between Python versions and terminals:
docs/cli.md, made from this one, must be the same everywhere.
"""

import textwrap
from typing import Any

from pydantic import BaseModel

from lorakit.cli.parsing.flags import Flag, Key, section_of
from lorakit.cli.verbs import VERBS
from lorakit.config.base import Settings

WIDTH = 88
"""Columns of the help."""

SWITCHES = {
    "--json": "print one JSON object on stdout, and everything else on stderr",
    "--print-config": "print all settings as they would be used, and stop",
    "--debug": "print the trace of an error too",
    "--help": "print this",
}
"""Flags that every verb has, and what they do."""


def overview(first: str = "") -> str:
    """The help of `lorakit --help`, or of `lorakit FIRST --help` for verbs of two words."""
    verbs = "\n".join(
        f"  {name:<14}{meaning}"
        for name, meaning in VERBS.items()
        if not first or name.startswith(f"{first} ")
    )
    return (
        "usage: lorakit VERB [CONFIG.yaml] [--NAME VALUE ...]\n\n"
        "The complete LoRA system: train, verify, switch, merge and use low-rank adapters.\n\n"
        f"{verbs}\n\n"
        "lorakit VERB --help lists a verb's settings; lorakit --version prints the version.\n"
    )


def verb_help(name: str, settings: type[Settings]) -> str:
    """The help of `lorakit NAME --help`."""
    switches = "\n".join(f"  {switch:<16}{meaning}" for switch, meaning in SWITCHES.items())
    return (
        f"usage: lorakit {name} [CONFIG.yaml] [--NAME VALUE ...]\n\n"
        f"{VERBS[name]}\n\n"
        "Settings come from a YAML file (CONFIG.yaml or --config FILE); flags override it.\n\n"
        f"settings:\n{_section(settings, None)}\n"
        f"every verb:\n{switches}\n"
    )


def _section(settings: type[BaseModel], defaults: BaseModel | None, within: Key = ()) -> str:
    """The entries of a class's settings, then its sections under their headings.

    A section's defaults are those of the field's default object, if it has one, since that may set
    other values than its class.
    """
    entries, sections = "", ""
    for name, field in settings.model_fields.items():
        default = getattr(defaults, name) if defaults else field.get_default()
        key, section = (*within, name), section_of(field)
        if section:
            heading = f"{'.'.join(key)}: {field.description or ''}".strip()
            sections += f"\n{heading}\n{_section(section, default, key)}"
        else:
            entries += _entry(Flag(key=key, field=field), default)
    return entries + sections


def _entry(flag: Flag, default: Any) -> str:
    """A flag's line, and its meaning below it."""
    typed = f"--[no-]{flag.name[2:]}" if flag.is_boolean else f"{flag.name} {flag.kind}"
    fallback = "required" if flag.field.is_required() else f"default: {_word(default)}"
    meaning = textwrap.fill(
        " ".join((flag.field.description or "").split()),
        WIDTH,
        initial_indent=" " * 6,
        subsequent_indent=" " * 6,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return f"  {typed}  ({fallback})\n{meaning}\n"


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
