"""Built-in task: say in an English sentence what a list of attributes says about a place.

No pair of kind and area in the validation and test rows occurs in training, though each kind and
each area does. So a model must compose them, and cannot recall them.
"""

import random
from dataclasses import dataclass
from functools import cache

from lorakit.data.builtin.drawing import Split, draw_rows
from lorakit.data.row_types import PromptRow

KNOWN_FOR = {
    "bakery": ("rye bread", "plum cake", "cinnamon rolls", "almond biscuits"),
    "bookshop": ("old maps", "poetry", "crime novels", "rare prints"),
    "gallery": ("glass art", "portraits", "wood carvings", "photographs"),
    "garden": ("roses", "orchids", "herb beds", "water lilies"),
    "library": ("manuscripts", "reading rooms", "folk songs", "newspapers"),
    "museum": ("fossils", "ship models", "clocks", "coins"),
    "park": ("oak trees", "duck ponds", "rope swings", "chess tables"),
    "theatre": ("comedies", "puppet shows", "dance nights", "musicals"),
}
"""Each kind of place, and what places of that kind are known for."""

AREAS = {
    "canal": "by the canal",
    "castle district": "in the castle district",
    "harbour": "by the harbour",
    "lake": "by the lake",
    "new quarter": "in the new quarter",
    "old town": "in the old town",
    "sea": "by the sea",
    "student quarter": "in the student quarter",
}
"""Each area, and how a sentence says that a place is there."""

COSTS = {"none": "free", "low": "cheap", "high": "costly"}
HOURS = {
    "early": "opens at dawn",
    "late": "stays open until midnight",
    "weekend": "opens only at weekends",
    "daily": "is open every day",
}
DOGS = {"yes": "welcomes dogs", "no": "does not admit dogs"}

UNSAID = (("cost",), ("known",), ("hours",), ("cost", "known"), ("known", "dogs"))
"""The attributes that a row leaves out; each choice keeps one of hours, dogs and known."""

FIRST_NAMES = ("Amber", "Copper", "Crooked", "Falcon", "Ivory", "Juniper", "Linden", "Marble")
LAST_NAMES = ("Anchor", "Arch", "Corner", "Gate", "Lantern", "Mill", "Tower", "Yard")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The meaning of a row: None where nothing is said."""

    name: str
    kind: str
    area: str
    cost: str | None = None
    hours: str | None = None
    dogs: str | None = None
    known: str | None = None

    def __str__(self) -> str:
        """The attributes in a line, as the prompt states them."""
        return ", ".join(f"{key}: {value}" for key, value in vars(self).items() if value)


def rows(split: str, *, seed: int = 0) -> tuple[PromptRow, ...]:
    """The task's train, validation or test rows.

    Raises:
        DataError: there is no such split.
    """
    return draw_rows(_draw, split, seed=seed)


def split_of(kind: str, area: str) -> Split:
    """The only split in which this kind of place occurs in this area."""
    kinds, areas = list(KNOWN_FOR), list(AREAS)
    held_out: dict[int, Split] = {0: "test", 1: "validation"}
    return held_out.get((kinds.index(kind) - areas.index(area)) % len(areas), "train")


def sentences(place: Place) -> tuple[str, ...]:
    """The ways to say it in one sentence; the first is the one that a model should learn.

    Which way comes first depends on the attributes: what a place is known for opens the sentence;
    else, where the cost is not given, kind and area are between commas. At least one of hours, dogs
    and known must be given.
    """
    clauses = [HOURS[place.hours]] if place.hours else []
    clauses += [DOGS[place.dogs]] if place.dogs else []
    known = [f"is known for its {place.known}"] if place.known else []
    kind = f"a {COSTS[place.cost]} {place.kind}" if place.cost else f"a {place.kind}"
    kind_there = f"{kind} {AREAS[place.area]}"
    assert clauses or known, f"too little is said of {place.name}"
    named = f"{place.name} is {kind_there} that {_listed(clauses + known)}."
    between = f"{place.name}, {kind_there}, {_listed(clauses + known)}."
    if not place.known:
        return (named, between) if place.cost else (between, named)
    rest = f" that {_listed(clauses)}" if clauses else ""
    return f"Known for its {place.known}, {place.name} is {kind_there}{rest}.", named, between


def _listed(clauses: list[str]) -> str:
    *others, last = clauses
    return f"{', '.join(others)} and {last}" if others else last


@cache
def _combinations(split: Split) -> tuple[tuple[str, str], ...]:
    pairs = ((kind, area) for kind in KNOWN_FOR for area in AREAS)
    return tuple(pair for pair in pairs if split_of(*pair) == split)


def _draw(rng: random.Random, split: Split) -> PromptRow:
    kind, area = rng.choice(_combinations(split))
    said = {
        "cost": rng.choice(list(COSTS)),
        "hours": rng.choice(list(HOURS)),
        "dogs": rng.choice(list(DOGS)),
        "known": rng.choice(KNOWN_FOR[kind]),
    }
    for unsaid in rng.choice(UNSAID):
        del said[unsaid]
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    place = Place(name=name, kind=kind, area=area, **said)
    first, *others = sentences(place)
    return PromptRow(prompt=str(place), completion=first, references=(first, *others))
