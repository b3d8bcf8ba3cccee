"""The overview of the verbs, and the switches that all of them have.

It is printed without importing anything but the list of verbs.
"""

import textwrap

from lorakit.cli.verbs import VERBS

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
    shown = {
        name: entry for name, entry in VERBS.items() if f"{name} ".startswith(f"{first} ".lstrip())
    }
    width = max(map(len, shown)) + 2
    verbs = "".join(listed(name, entry.meaning, width) for name, entry in shown.items())
    return (
        "usage: lorakit VERB [CONFIG.yaml] [--NAME VALUE ...]\n\n"
        "The complete LoRA system: train, verify, switch, merge and use low-rank adapters.\n\n"
        f"{verbs}\n"
        "lorakit VERB --help lists a verb's settings; lorakit --version prints the version.\n"
    )


def listed(name: str, meaning: str, width: int) -> str:
    """A line of a list: the name, padded to a width, and its meaning, wrapped beside it."""
    return (
        textwrap.fill(
            meaning,
            WIDTH,
            initial_indent=f"  {name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
        + "\n"
    )
