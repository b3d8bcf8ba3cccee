"""What METEOR knows of English: stems, synonyms, paraphrases, function words, abbreviations.

All of it comes from the files of METEOR 1.5 in the wheel of pycocoevalcap (the extra `metrics`),
which hold WordNet 3.0's synonyms and 5.27 million pairs of paraphrases. The pairs are read once,
for half a minute, into a file of the cache.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import zipfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from lorakit.adapter.atomic_write import write_new_file
from lorakit.data.metrics.meteor.normalize import ALWAYS, BEFORE_NUMBERS
from lorakit.errors import DataError, MissingExtraError
from lorakit.models.gguf_file import cache_folder

_JAR = "pycocoevalcap/meteor/meteor-1.5.jar"
_PARAPHRASES = "pycocoevalcap/meteor/data/paraphrase-en.gz"

# WordNet's endings, and what replaces them: nouns, verbs, adjectives.
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
    ("es", "e"),
    ("es", ""),
    ("ed", "e"),
    ("ed", ""),
    ("ing", "e"),
    ("ing", ""),
    ("er", ""),
    ("est", ""),
    ("er", "e"),
    ("est", "e"),
)

Phrase = tuple[str, ...]


class Tables:
    """METEOR's word lists for English.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """

    def __init__(self) -> None:
        self._jar = zipfile.ZipFile(packaged(_JAR))

    def _lines(self, name: str) -> list[str]:
        return self._jar.read(name).decode().split("\n")

    @cached_property
    def function_words(self) -> frozenset[str]:
        """Words that count less than others: articles, prepositions, punctuation."""
        return frozenset(self._lines("function/english.words")) - {""}

    @cached_property
    def prefixes(self) -> Mapping[str, int]:
        """Words whose full stop does not end a sentence, with where that is so."""
        prefixes = {}
        for line in self._lines("nonbreaking/english.prefixes"):
            words = line.split()
            if words and not words[0].startswith("#"):
                numeric = words[1:2] == ["#NUMERIC_ONLY#"]
                prefixes[words[0]] = BEFORE_NUMBERS if numeric else ALWAYS
        return prefixes

    @cached_property
    def _synsets(self) -> Mapping[str, str]:
        return dict(_pairs(self._lines("synonym/english.synsets")))

    @cached_property
    def _bases(self) -> Mapping[str, list[str]]:
        bases: dict[str, list[str]] = {}
        for base, forms in _pairs(self._lines("synonym/english.exceptions")):
            for form in forms.split():
                bases.setdefault(form, []).append(base)
        return bases

    @cache  # noqa: B019  (one Tables lives as long as the process)
    def synsets(self, word: str) -> frozenset[str]:
        """WordNet's sets of synonyms that a word, or a base form of it, is in."""
        bases = self._bases.get(word) or [self._base_form(word)]
        return frozenset(
            synset for form in [word, *bases] for synset in self._synsets.get(form, "").split()
        )

    def _base_form(self, word: str) -> str:
        if word.endswith("ss") or len(word) <= 2:
            return word
        for ending, replacement in _ENDINGS:
            base = word.removesuffix(ending) + replacement
            if word.endswith(ending) and base in self._synsets:
                return base
        return ""

    def paraphrases(self, vocabulary: Iterable[str]) -> dict[Phrase, list[Phrase]]:
        """The paraphrases of each phrase, of pairs whose words are all in a vocabulary."""
        words, tokens, lengths = self._paraphrase_table
        starts = self._paraphrase_starts
        known = np.zeros(len(words), bool)
        for word in vocabulary:
            place = bisect_left(words, word)
            # A word that the table lacks has the place of its successor there.
            if words[place : place + 1] == [word]:
                known[place] = True
        # Most pairs go by their first word, so that few have all of theirs looked at.
        pairs = np.flatnonzero(known[tokens[starts[:-1:2]]])
        bounds = starts[2 * pairs], starts[2 * pairs + 2]
        inside = np.concatenate([[0], np.cumsum(bounds[1] - bounds[0])])
        places = np.arange(inside[-1]) + np.repeat(bounds[0] - inside[:-1], np.diff(inside))
        if len(pairs):
            pairs = pairs[np.logical_and.reduceat(known[tokens[places]], inside[:-1])]
        found: dict[Phrase, list[Phrase]] = {}
        # A pair's words are in a row: those of the phrase, then those of its paraphrase.
        spans = zip(starts[2 * pairs].tolist(), *lengths[pairs].T.tolist(), strict=True)
        for start, length, other in spans:
            both = [words[token] for token in tokens[start : start + length + other].tolist()]
            found.setdefault(tuple(both[:length]), []).append(tuple(both[length:]))
        return found

    @cached_property
    def _paraphrase_starts(self) -> NDArray[np.int64]:
        """The index of each phrase's first word among the words of all, and the end of the last."""
        _, _, lengths = self._paraphrase_table
        return np.concatenate([[0], np.cumsum(lengths.ravel(), dtype=np.int64)])

    @cached_property
    def _paraphrase_table(self) -> tuple[list[str], NDArray[np.int32], NDArray[np.uint8]]:
        """The sorted words; the pairs' words in a row; the lengths of each pair's phrases."""
        source = packaged(_PARAPHRASES)
        size = source.stat().st_size
        key = hashlib.sha256(f"2 {source.name} {size}".encode()).hexdigest()[:12]
        path = cache_folder() / f"meteor-paraphrases-{key}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new_file(path, save(_read_paraphrases(source)))
        tensors = load_file(path)
        words = tensors["words"].tobytes().decode().split("\n")
        return words, tensors["tokens"], tensors["lengths"]


def check_files() -> None:
    """Make sure that METEOR's files are installed.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
        DataError: its wheel lacks a file.
    """
    lacking = [name for name in (_JAR, _PARAPHRASES) if not packaged(name).is_file()]
    if lacking:
        raise DataError(
            f"METEOR needs {' and '.join(lacking)}, which the installed pycocoevalcap lacks: pip"
            " install --force-reinstall pycocoevalcap"
        )


@cache
def tables() -> Tables:
    """The one set of METEOR's word lists of this process.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    return Tables()


def packaged(name: str) -> Path:
    """The path of a file in the wheel of pycocoevalcap.

    Raises:
        MissingExtraError: pycocoevalcap is not installed.
    """
    try:
        files = importlib.metadata.distribution("pycocoevalcap")
    except importlib.metadata.PackageNotFoundError:
        raise MissingExtraError("METEOR", "metrics") from None
    return Path(str(files.locate_file(name)))


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each line with the one after it, two by two."""
    return zip(lines[::2], lines[1::2], strict=False)


def _read_paraphrases(source: Path) -> dict[str, NDArray[np.generic]]:
    """The table of paraphrases as arrays; of each three lines in the file the first is a weight."""
    ids: dict[str, int] = {}
    tokens: list[NDArray[np.int32]] = []
    lengths: list[NDArray[np.uint8]] = []
    with gzip.open(source, "rt", encoding="utf-8", newline="\n") as file:
        while block := list(islice(file, 300_000)):
            phrases = [
                line.split() for index, line in enumerate(block) if index % 3 and line.strip()
            ]
            numbers = [ids.setdefault(word, len(ids)) for phrase in phrases for word in phrase]
            tokens.append(np.array(numbers, np.int32))
            lengths.append(np.array([len(phrase) for phrase in phrases], np.uint8))
    words = sorted(ids)
    places = np.empty(len(ids), np.int32)
    places[[ids[word] for word in words]] = np.arange(len(ids), dtype=np.int32)
    return {
        "words": np.frombuffer("\n".join(words).encode(), np.uint8),
        "tokens": places[np.concatenate(tokens)],
        "lengths": np.concatenate(lengths).reshape(-1, 2),
    }
