"""E2E NLG (Novikova et al., 2017): a restaurant's attributes to a sentence.

The attributes are written as in the data of the paper's code ("name : X | Type : Y"), which calls
`eatType` Type and leaves a space on both sides of every colon and bar.
"""

from __future__ import annotations

import re

from lorakit.data.row_types import Row
from lorakit.data.tasks.task import Task, Values, splits, with_references

_ATTRIBUTE = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")
_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def linearized(meaning: str) -> str:
    """The attributes of a meaning representation, as the paper's code writes them.

    >>> linearized("name[The Mill], eatType[pub], familyFriendly[no]")
    'name : The Mill | Type : pub | family friendly : no'

    Raises:
        ValueError: it is no list of attributes.
    """
    found = _ATTRIBUTE.findall(meaning)
    if not found or _ATTRIBUTE.sub("", meaning).strip():
        raise ValueError(f"{meaning[:60]!r} is no meaning representation such as name[X], area[Y]")
    return " | ".join(
        f"{_NAMES.get(name.strip(), name.strip())} : {value}" for name, value in found
    )


def _row(values: Values) -> Row:
    references = values.get("references") or [values["human_reference"]]
    return with_references(linearized(values["meaning_representation"]), references)


TASK = Task(
    name="e2e",
    hub="GEM/e2e_nlg",
    splits=splits(train=42_061, validation=4_672, test=4_693),
    row=_row,
    grouped=True,
)
