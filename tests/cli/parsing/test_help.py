"""The help: every setting with its flag, its default and its meaning."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from lorakit.cli.overview import WIDTH, overview
from lorakit.cli.parsing.flags import flags_of
from lorakit.cli.parsing.help import ALL, verb_help
from lorakit.cli.verbs import VERBS
from lorakit.config.base import Names, Settings
from lorakit.config.train import TrainConfig


def test_help_has_every_setting_of_training_with_its_meaning():
    text = " ".join(verb_help("train", TrainConfig, ALL).split())
    for flag in flags_of(TrainConfig):
        assert flag.name.removeprefix("--") in text
        assert flag.field.description, f"{flag.name} has no docstring"
        assert " ".join(flag.field.description.split()) in text


def test_no_line_is_wider_than_the_help():
    pages = (overview(), verb_help("train", TrainConfig), verb_help("train", TrainConfig, ALL))
    assert max(len(line) for page in pages for line in page.splitlines()) <= WIDTH


def test_help_of_training_fits_a_screen_and_names_every_setting_once():
    text = verb_help("train", TrainConfig)
    named = re.findall(r"--(?:\[no-\])?([a-z][a-z._-]*)", text.partition("every verb:")[0])
    for flag in flags_of(TrainConfig):
        assert named.count(flag.name[2:]) == 1, flag.name
    assert len(text.splitlines()) < 80


def test_meanings_stand_in_one_column():
    lines = [line for line in overview().splitlines() if line.startswith("  ")]
    names = list(VERBS)
    columns = {line.index(VERBS[name].meaning) for name, line in zip(names, lines, strict=True)}
    assert len(columns) == 1
    assert all(line[column - 1] == " " for column in columns for line in lines)


class Inner(Settings):
    """Settings of a section."""

    width: int = 8
    """A width."""


class Sample(Settings):
    """Settings of every kind."""

    out: Path
    """A folder."""
    rate: float | None = None
    """A number."""
    names: Names = ("q", "v")
    """A list."""
    seeds: tuple[int, ...] = ()
    """Numbers."""
    mode: Literal["slow", "fast"] = "slow"
    """A choice."""
    columns: dict[str, str] = Field(default={})
    """A mapping."""
    separator: str = "\n"
    """A text."""
    resume: bool = True
    """A switch."""
    inner: Inner = Inner(width=4)
    """What is inside."""


def test_each_kind_of_setting_shows_how_it_is_typed():
    text = verb_help("train", Sample)
    assert text.partition("settings:\n")[2].partition("\nevery verb:")[0] == (
        "  --out PATH  (required)\n"
        "      A folder.\n"
        "  --rate X  (default: none)\n"
        "      A number.\n"
        "  --names TEXT,…  (default: q,v)\n"
        "      A list.\n"
        "  --seeds N,…  (default: empty)\n"
        "      Numbers.\n"
        "  --mode slow|fast  (default: slow)\n"
        "      A choice.\n"
        "  --columns '{NAME: VALUE}'  (default: empty)\n"
        "      A mapping.\n"
        "  --separator TEXT  (default: '\\n')\n"
        "      A text.\n"
        "  --[no-]resume  (default: yes)\n"
        "      A switch.\n"
        "\n"
        "inner: What is inside.\n"
        "  --inner.width N  (default: 4)\n"
        "      A width.\n"
    )
