"""The verb completion: a script that completes verbs, flags, choices and files in a shell.

Its library, shtab, reads an argparse parser, which is made from the verbs and flags for that alone.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from lorakit.cli.overview import SWITCHES
from lorakit.cli.parsing.flags import Flag, flags_of
from lorakit.cli.verbs import VERBS, Result, second_words, settings_of
from lorakit.config.base import Settings
from lorakit.config.fields import types_of
from lorakit.config.verbs import CompletionConfig
from lorakit.errors import MissingExtraError


def run(settings: CompletionConfig) -> Result:
    """The script of a shell."""
    try:
        import shtab
    except ImportError:
        raise MissingExtraError("completion in a shell", "completion") from None
    script = shtab.complete(parser(shtab.FILE), settings.shell)
    return Result(text=script, data={"shell": settings.shell, "script": script})


def parser(file: Any) -> ArgumentParser:
    """An argparse parser with all verbs and flags.

    Args:
        file: what shtab wants to be told of an argument that is a file.
    """
    whole = ArgumentParser(prog="lorakit", add_help=False)
    verbs = whole.add_subparsers()
    groups: dict[str, Any] = {}
    for name, entry in VERBS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            # shtab leaves out a verb without a meaning.
            meaning = f"One of {', '.join(second_words(first))}."
            group = verbs.add_parser(first, help=meaning, add_help=False)
            groups[first] = group.add_subparsers()
        verb = (groups[first] if second else verbs).add_parser(
            second or first, help=_plain(entry.meaning), add_help=False
        )
        _add_words(verb, name, file)
        for flag in flags_of(settings_of(name)):
            _add_flag(verb, flag, file)
        for switch, meaning in SWITCHES.items():
            verb.add_argument(switch, action="store_true", help=_plain(meaning))
    return whole


def _add_words(verb: ArgumentParser, name: str, file: Any) -> None:
    """Add the words without a flag: the choices of the first, where it has some, else files."""
    settings = settings_of(name)
    first = next(iter(settings.positional), None)
    choices = _choices(settings.model_fields[first].annotation) if first else []
    # fish shows the meaning of the setting beside each choice.
    words: Any = verb.add_argument(
        "words", nargs="*", choices=choices or None, help=_meaning(settings, first)
    )
    if not choices:
        words.complete = file


def _add_flag(verb: ArgumentParser, flag: Flag, file: Any) -> None:
    """Add a flag, with its choices, or as a file where it may be one."""
    meaning = _plain(_first_sentence(flag.field.description))
    if flag.is_boolean:
        names = (flag.name, f"--no-{flag.name[2:]}")
        verb.add_argument(*names, action="store_true", help=meaning)
        return
    choices = _choices(flag.field.annotation)
    added: Any = verb.add_argument(flag.name, choices=choices or None, help=meaning)
    if not choices and {Path, str} & set(types_of(flag.field.annotation)):
        added.complete = file


def _choices(annotation: Any) -> list[str]:
    """The words that a setting may be, if these are known."""
    literals = (each for each in types_of(annotation) if get_origin(each) is Literal)
    return [str(word) for each in literals for word in get_args(each)]


def _meaning(settings: type[Settings], name: str | None) -> str | None:
    """The first sentence about a setting."""
    return _plain(_first_sentence(settings.model_fields[name].description)) if name else None


def _first_sentence(text: str | None) -> str:
    return (text or "").partition(". ")[0].partition(": ")[0]


def _plain(text: str) -> str:
    """A text as argparse wants it, in which a per cent sign is doubled."""
    return " ".join(text.split()).replace("%", "%%")
