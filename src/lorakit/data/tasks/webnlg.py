"""WebNLG 2017 (Gardent et al., 2017): triples of DBpedia to text.

Triples are written as in the data of the paper's code: "subject : property : object", with a bar
between two triples. Of the hub's references only those marked good are taken, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorakit.data.row_types import PromptRow, Row
from lorakit.data.tasks.task import Task, Values, splits, with_references

SEEN = (
    *("Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument"),
    *("SportsTeam", "University", "WrittenWork"),
)
"""The categories of the training rows; the test rows have others too."""


def linearized(triples: list[list[str]]) -> str:
    """Triples in one line.

    >>> linearized([["Mill", "location", "Bay"], ["Bay", "country", "X"]])
    'Mill : location : Bay | Bay : country : X'

    Raises:
        ValueError: a triple has not three parts.
    """
    for triple in triples:
        if len(triple) != 3:
            raise ValueError(f"{triple!r} is no triple")
    return " | ".join(" : ".join(part.strip() for part in triple) for triple in triples)


def _row(values: Values) -> Row:
    if "triples" in values:
        texts, references = values["triples"], values["references"]
    else:
        texts = values["modified_triple_sets"]["mtriple_set"][0]
        rated = zip(values["lex"]["text"], values["lex"]["comment"], strict=True)
        references = [text for text, comment in rated if comment == "good"]
    row = with_references(linearized([text.split(" | ") for text in texts]), references)
    return replace(row, values={"category": values.get("category")})


def _seen(rows: Sequence[Row]) -> dict[str, list[bool]]:
    """Whether each row's category is one of training, unless the data is without categories."""
    categories = [row.values["category"] for row in rows if isinstance(row, PromptRow)]
    return {} if None in categories else {"seen": [name in SEEN for name in categories]}


TASK = Task(
    name="webnlg",
    hub="webnlg-challenge/web_nlg/webnlg_challenge_2017",
    splits=splits(train=18_102, validation=2_268, test=4_928),
    row=_row,
    beside=_seen,
)
