"""The entry point: one verb, its settings, and one way to print results and errors.

Exit codes: 0 success; 2 a mistake that the user can mend; 130 Ctrl-C; 141 the reader of stdout has
closed it; 1, with a trace, a defect of lorakit.

What takes long to import is imported where it is needed: neither the list of verbs nor the version
needs pydantic, and neither flags nor help need torch.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from io import TextIOWrapper

from lorakit import __version__
from lorakit.cli.overview import SWITCHES, overview
from lorakit.cli.verbs import VERBS, Result, loaded_verb, second_words, settings_of
from lorakit.errors import ConfigError, LorakitError, did_you_mean
from lorakit.upstream.quiet_library import quiet_library


@dataclass(frozen=True)
class _Line:
    """A command line: its words, and the switches taken out of them."""

    words: list[str]
    switches: set[str]
    topic: str | None
    """The word right after --help."""

    @classmethod
    def of(cls, argv: Sequence[str]) -> "_Line":
        words = [word for word in argv if word not in SWITCHES]
        helped = argv.index("--help") + 1 if "--help" in argv else len(argv)
        topic = next((word for word in argv[helped : helped + 1] if word in words), None)
        return cls(words=words, switches=set(argv) & SWITCHES.keys(), topic=topic)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that a command line names, and return the exit code.

    Args:
        argv: the words after `lorakit`. None: those of this process.
    """
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    line = _Line.of(["--help" if word == "-h" else word for word in words])
    if isinstance(sys.stdout, TextIOWrapper):
        # What an encoding such as cp1252 lacks is written as \\u2192, as on stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # transformers imports PEFT if it is there, and PEFT imports bitsandbytes.
        with quiet_library():
            code = _run(line)
    except BrokenPipeError:
        _silence()
        return 141
    except _StdoutError as error:
        _silence()
        print(f"error: the result cannot be written to stdout: {error}", file=sys.stderr)
        return 2
    return code


class _StdoutError(Exception):
    """stdout takes no more, as on a full disk."""


def _print(text: str) -> None:
    """Print a text, and see to it that it is out."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _StdoutError(error.strerror) from error


def _silence() -> None:
    """Send to nowhere what the interpreter flushes at its end, where that would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())


def _run(line: _Line) -> int:
    """Print the result of a command line, or what went wrong, and return the exit code."""
    as_json = "--json" in line.switches
    try:
        with _stdout_on_stderr() if as_json and sys.stdout is not None else nullcontext():
            result = _result(line)
        text = _json(result.data) if as_json else result.text.rstrip("\n")
    except (LorakitError, KeyboardInterrupt) as error:
        return _fail(error, line.switches)
    except BrokenPipeError:
        raise
    except Exception as error:
        if as_json:
            _print(_error_json(error))
        raise
    if text and not _is_beside_another():
        _print(text)
    elif sys.stdout is not None:
        sys.stdout.flush()
    return 0


def _result(line: _Line) -> Result:
    """The result of the verb; or the help, the version or the settings, if a switch says so."""
    words, switches = line.words, line.switches
    if words == ["--version"]:
        return Result(text=f"lorakit {__version__}", data={"version": __version__})
    if not words:
        meanings = {name: entry.meaning for name, entry in VERBS.items()}
        return Result(text=overview(), data={"verbs": meanings})
    if "--help" in switches and len(words) == 1 and second_words(words[0]):
        text = overview(words[0])
        return Result(text=text, data={"help": text})
    name, rest = _verb_and_rest(words)
    if "--help" in switches:
        from lorakit.cli.parsing.help import verb_help

        topic = line.topic if line.topic in rest else None
        text = verb_help(name, settings_of(name), topic)
        return Result(text=text, data={"help": text})
    from lorakit.cli.parsing.settings import parse, to_yaml

    settings = parse(settings_of(name), rest)
    if "--print-config" in switches:
        return Result(text=to_yaml(settings), data=settings.model_dump())
    with loaded_verb(name) as verb:
        return verb.run(settings)


def _verb_and_rest(words: list[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, with which a command line starts, and what follows it.

    Raises:
        ConfigError: there is no such verb.
    """
    first, *rest = words
    if first in VERBS:
        return first, rest
    seconds = second_words(first)
    if not seconds:
        known = dict.fromkeys(name.partition(" ")[0] for name in VERBS)
        hint = did_you_mean(first, known) or f"; its verbs are {', '.join(known)}"
        raise ConfigError(f"lorakit has no verb {first!r}{hint}")
    second = rest[0] if rest and not rest[0].startswith("-") else None
    if second in seconds:
        return f"{first} {second}", rest[1:]
    named = f"one of {', '.join(seconds)}"
    if second is None:
        raise ConfigError(f"lorakit {first} needs a second word: {named}")
    hint = did_you_mean(second, seconds)
    raise ConfigError(f"lorakit {first} has no verb {second!r}; it needs {named}{hint}")


def _fail(error: BaseException, switches: set[str]) -> int:
    """Print the message of an error, and return the exit code."""
    code = 130 if isinstance(error, KeyboardInterrupt) else 2
    if _are_many():
        from lorakit.training.processes import is_first_to_tell

        if not is_first_to_tell():
            return code
    if "--debug" in switches:
        traceback.print_exception(error)
    stopped = isinstance(error, KeyboardInterrupt)
    print(_message(error) if stopped else f"error: {_message(error)}", file=sys.stderr)
    if "--json" in switches:
        _print(_error_json(error))
    return code


def _are_many() -> bool:
    """Whether a launcher such as torchrun has started several processes."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


def _is_beside_another() -> bool:
    """Whether another process than this one prints the result."""
    return _are_many() and os.environ.get("RANK", "0") != "0"


def _message(error: BaseException) -> str:
    """The error's own words; Ctrl-C has none unless a verb gave it some."""
    return str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else repr(error))


def _error_json(error: BaseException) -> str:
    """The object that --json prints for an error."""
    return _json({"error": {"type": type(error).__name__, "message": _message(error)}})


def _json(data: dict[str, object]) -> str:
    """One line of JSON; NaN and infinity, which JSON lacks, become null."""
    from pydantic_core import to_jsonable_python

    return json.dumps(to_jsonable_python(data, inf_nan_mode="null"))


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, for Python, libraries in C and child processes alike.

    So nothing but the result gets into the JSON on stdout.
    """
    stdout = sys.stdout
    stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
