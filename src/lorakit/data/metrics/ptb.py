"""Words as the Penn Treebank cuts them, in the way of the COCO metrics that E2E's scorer uses.

The reference is CoreNLP 3.4.1's PTBTokenizer with `-preserveLines -lowerCase`, and the list of
tokens that the COCO metrics then drop. It takes the longest match of its rules at each place and
looks beyond the end of a line, so all lines of a file are cut together.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

DROPPED = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))
"""Tokens that do not count. (The scorer lists brackets too, but in upper case, so they stay.)"""

_LETTER = "A-Za-z_\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u0300-\u1fff"
_WORD_CHARACTERS = f"[{_LETTER}0-9]+"
_APOSTROPHE, _ANY_QUOTE = "['’]", "['’`‘]"
_END = f"(?![{_LETTER}0-9])"
_HYPHEN = "[-\u2010\u2011]"

_WORD = f"[{_LETTER}][{_LETTER}0-9]*(?:[.!?][{_LETTER}][{_LETTER}0-9]*)*"
_ELISION = f"(?:[dol]{_ANY_QUOTE}(?=[{_LETTER}0-9]))?"
_HYPHENATED = f"{_ELISION}{_WORD_CHARACTERS}(?:{_HYPHEN}{_ELISION}{_WORD_CHARACTERS})*"

_ABBREVIATIONS = "|".join(
    (
        "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thurs?|fri",
        "ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn",
        "tenn|va|vt|wisc?|wyo|(?-i:Az|Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash)",
        "inc|cos?|corp|pp?t[ye]s?|ltd|plc|bancorp|dept|bhd|assn|assoc|univ|intl|sys|adv",
        "mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt",
        "capt|ste?|ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|jr|sr|bros|esq|blvd|rd|ft",
        r"(?:ed|ph)\.d|tel|est|ext|sq|etc|al|seq|vs|alex|wm|jos|cie|cf|invt|elec|natl|m[ft]g",
    )
)
# After one of these words the full stop of a single letter ends a sentence.
_SENTENCE_STARTS = (
    "about|according|additionally|after|an?|as|at|but|earlier|he|her|here|however|if|in|it|last|many"
    r"|more|mr\.|ms\.|now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these"
    "|they|this|we|when|while|what|yet|you"
)
_UPPER = "(?=(?-i:[A-Z]))"
_WITH_APOSTROPHE = (
    rf"[{_LETTER}]+[aeiouy]{_ANY_QUOTE}(?-i:[aeiouA-Z])[{_LETTER}]*",
    rf"(?-i:[A-HJ-XZn]){_ANY_QUOTE}[{_LETTER}]{{2,}}",
    rf"[ldj]{_APOSTROPHE}(?=[{_LETTER}])",
    rf"{_APOSTROPHE}n{_APOSTROPHE}?{_END}",
    rf"{_APOSTROPHE}(?:em|till?|cause){_END}",
    f"{_APOSTROPHE}[2-9]0s",
    f"ol{_APOSTROPHE}",
)
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
# The longest match counts, and of equal ones the first.
_TOKENS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:https?|ftp)://[^\s<>|]*[^\s<>|.!?,;:'\"(){}-]",
        r"[a-z0-9][^\s\"<>|()]*@(?:[^\s\"<>|().]+\.)+[^\s\"<>|().]+",
        _WORD,
        *_WITH_APOSTROPHE,
        "[-+]?(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)",
        _HYPHENATED,
        f"[0-9]+(?:[.,][0-9]+)*(?:-[{_LETTER}]+)+",
        "(?-i:[A-Z]+(?:[+&][A-Z]+)+)",
        rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
        "[0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4}",
        "[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}",
        "(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
        rf"(?:{_ABBREVIATIONS})\.",
        r"(?:ca|figs?|prop|nos?|art|bldg|pp|op)\.(?=\s?[0-9])",
        r"[a-z](?:\.[a-z])+\.",
        rf"[a-z]\.(?!\s+{_UPPER}(?:{_SENTENCE_STARTS})\s)(?=[\s)\"]|\.\s|$)",
        rf"{_WORD}\.(?=[,;:])",
        "--+",
        r"\.\.+",
    )
]
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s)")
_TWO_WORDS = frozenset(("cannot", "gonna", "gotta", "lemme", "gimme", "wanna"))
# What is cut off, or into pieces, wherever it stands.
_PIECES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"({_APOSTROPHE}(?:[msd]|re|ve|ll)){_END}",
        f"(?:(can)(not)|(gon|wan)(na)|(got)(ta)|(lem|gim)(me)){_END}",
        rf"([{_LETTER}0-9.]*?)(n{_APOSTROPHE}t){_END}",
    )
]
_RENAMED = {
    "(": "-LRB-",
    ")": "-RRB-",
    "{": "-LCB-",
    "}": "-RCB-",
    "[": "-LSB-",
    "]": "-RSB-",
    "£": "#",
    "€": "$",
    '"': "''",
    "“": "``",
    "”": "''",
    "–": "--",
    "—": "--",
    "…": "...",
    "‘": "`",
    "’": "'",
}
_ENTITY = re.compile("&(?:amp|lt|gt|quot|apos);")


def coco_tokens(lines: Sequence[str]) -> list[list[str]]:
    """The tokens of each line, in lower case, without those that do not count.

    Args:
        lines: all texts of one file; a line break inside a text counts as a space.
    """
    clean = [_ENTITY.sub(lambda entity: html.unescape(entity[0]), line) for line in lines]
    clean = [" ".join(line.splitlines()) for line in clean]
    ends = list(accumulate(len(line) + 1 for line in clean))
    cut: list[list[str]] = [[] for _ in lines]
    for start, token in _tokens("\n".join(clean)):
        token = token.lower()
        if token not in DROPPED:
            cut[bisect_right(ends, start)].append(token)
    return cut


def _tokens(text: str) -> Iterator[tuple[int, str]]:
    """Each token with its place."""
    place = 0
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if (word := _PLAIN_WORD.match(text, place)) and word[0].lower() not in _TWO_WORDS:
            yield place, word[0]
            place = word.end()
            continue
        start = place
        for pieces in _PIECES:
            if match := pieces.match(text, place):
                place = match.end()
                pieces_found = (piece.replace("’", "'") for piece in match.groups() if piece)
                yield from ((start, piece) for piece in pieces_found)
                break
        else:
            matches = (token.match(text, place) for token in _TOKENS)
            found = max(filter(None, matches), key=lambda match: match.end(), default=None)
            place = found.end() if found else place + 1
            token = text[start:place]
            yield start, _RENAMED.get(token) or _plain(token)


def _plain(token: str) -> str:
    """The token as it is printed: one dash, three full stops, and no space that would end it."""
    if token.startswith(("--", "..")):
        return token[:2] if token[0] == "-" else "..."
    return token.replace(" ", "\u00a0")
