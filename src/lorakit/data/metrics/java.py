"""The official Java programs of METEOR and the PTB tokeniser, as a check of ours."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lorakit.data.metrics.meteor.tables import packaged
from lorakit.data.metrics.ptb import DROPPED
from lorakit.errors import DataError

_CORENLP = "pycocoevalcap/tokenizer/stanford-corenlp-3.4.1.jar"
_METEOR = "pycocoevalcap/meteor/meteor-1.5.jar"


def coco_tokens(lines: Sequence[str]) -> list[list[str]]:
    """The same as `ptb.coco_tokens`, by CoreNLP 3.4.1.

    Raises:
        DataError: there is no Java, or it failed.
        MissingExtraError: pycocoevalcap is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "lines"
        source.write_text("\n".join(" ".join(line.splitlines()) for line in lines) + "\n")
        tokenizer = "edu.stanford.nlp.process.PTBTokenizer"
        words = ["-cp", str(packaged(_CORENLP)), tokenizer, "-preserveLines", "-lowerCase"]
        printed = _run([*words, str(source)])
    cut = [line.split() for line in printed.split("\n")[: len(lines)]]
    return [[token for token in tokens if token not in DROPPED] for tokens in cut]


def meteor(
    outputs: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, list[float]]:
    """The same as `meteor.score.meteor`, by METEOR's own program.

    Raises:
        DataError: there is no Java, or it failed.
        MissingExtraError: pycocoevalcap is not installed.
    """
    lines = [
        " ||| ".join(("SCORE", *known, output))
        for output, known in zip(outputs, references, strict=True)
    ]
    words = ["-jar", "-Xmx2G", str(packaged(_METEOR)), "-", "-", "-stdio", "-l", "en", "-norm"]
    statistics = _run(words, "\n".join(lines) + "\n").split("\n")[: len(lines)]
    evaluated = _run(words, " ||| ".join(("EVAL", *statistics)) + "\n").split()
    *segments, total = map(float, evaluated)
    return total, segments


def _run(words: Sequence[str], text: str = "") -> str:
    java = shutil.which("java")
    if java is None:
        raise DataError("The official programs need Java, and there is no `java` on the PATH.")
    options = [word for word in words if word.startswith("-Xmx")]
    words = [java, *options, *(word for word in words if word not in options)]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DataError(f"{Path(words[-1]).name} failed in Java: {done.stderr.strip()[-300:]}")
    return done.stdout
