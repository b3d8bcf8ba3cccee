"""METEOR's normalisation of a line (`-norm`): punctuation set apart, quotes and dashes plain."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LETTERS = "A-Za-zŠŽšžŸÀ-ÖØ-öø-žЀ-ԧꙀ-ꙮ꙾-ꚗᴀ-ᵿ"
_ALPHANUMERIC = f"0-9{_LETTERS}"
_SPACES = re.compile("[ \u00a0\u2000-\u200a\u202f\u205f\u3000]+")

ALWAYS, BEFORE_NUMBERS = 1, 2
"""Where the full stop after a prefix does not end a sentence."""

# A run of full stops is kept together under a name while single ones are set apart.
_DOTS, _MORE_DOTS = "DOTMULTI", "DOTDOTMULTI"

_APART = (
    (re.compile(rf"([^{_ALPHANUMERIC}\s.'`,\-‘’])"), r" \1 "),
    (re.compile(r"\.(\.+)"), rf" {_DOTS}\1"),
)
_COMMAS_QUOTES_DASHES = (
    (re.compile(r"([^0-9]),([^0-9])"), r"\1 , \2"),
    (re.compile(r"([0-9]),([^0-9])"), r"\1 , \2"),
    (re.compile(r"([^0-9]),([0-9])"), r"\1 , \2"),
    (re.compile("[`‘’]"), "'"),
    (re.compile("[“”]|''"), ' " '),
    (re.compile("–|--"), "-"),
    (re.compile(rf"([{_ALPHANUMERIC}.])-([{_ALPHANUMERIC}])"), r"\1 \2"),
)
_CONTRACTIONS = (
    (re.compile(rf"([^{_LETTERS}])'([^{_LETTERS}])"), r"\1 ' \2"),
    (re.compile(rf"([^{_ALPHANUMERIC}])'([{_LETTERS}])"), r"\1 ' \2"),
    (re.compile(rf"([{_LETTERS}])'([^{_LETTERS}])"), r"\1 ' \2"),
    (re.compile(rf"([{_LETTERS}])'([{_LETTERS}])"), r"\1 '\2"),
    (re.compile(r"([0-9])'(s)"), r"\1 '\2"),
)
_LETTER = re.compile(f"[{_LETTERS}]")
_LOWER_CASE = re.compile("[a-z]")
_DIGIT = re.compile("[0-9]")


def normalized_words(line: str, prefixes: Mapping[str, int]) -> list[str]:
    """The words of a line in lower case, as METEOR's normaliser for English cuts them.

    Args:
        line: any text without line breaks.
        prefixes: words whose full stop does not end a sentence, with `ALWAYS` or `BEFORE_NUMBERS`.
    """
    line = _replaced(f" {line} ", _APART)
    while f"{_DOTS}." in line:
        line = re.sub(rf"{_DOTS}\.([^.])", rf"{_MORE_DOTS} \1", line)
        line = line.replace(f"{_DOTS}.", _MORE_DOTS)
    line = _replaced(_replaced(line, _COMMAS_QUOTES_DASHES), _CONTRACTIONS)
    line = _full_stops(line.split(), prefixes)
    while _MORE_DOTS in line:
        line = line.replace(_MORE_DOTS, f"{_DOTS}.")
    return _SPACES.sub(" ", line.replace(_DOTS, ".")).strip().lower().split()


def _replaced(line: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, replacement in rules:
        line = pattern.sub(replacement, line)
    return line


def _full_stops(words: list[str], prefixes: Mapping[str, int]) -> str:
    """The line with full stops set apart from words that they do not belong to."""
    following = [*words[1:], ""][: len(words)]
    pairs = zip(words, following, strict=True)
    return " ".join(_full_stop(word, next_word, prefixes) for word, next_word in pairs)


def _full_stop(word: str, next_word: str, prefixes: Mapping[str, int]) -> str:
    if len(word) < 2 or not word.endswith("."):
        return word
    stem = word[:-1]
    if "." in stem and _LETTER.search(stem):
        return word.replace(".", "")
    when = prefixes.get(stem)
    if when == ALWAYS or _LOWER_CASE.match(next_word):
        return word
    if when == BEFORE_NUMBERS and _DIGIT.match(next_word):
        return word
    return f"{stem} ."
