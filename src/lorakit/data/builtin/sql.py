"""Built-in task: write the SQL query that answers a question about a table.

The prompt shows the table's columns, in a new order each time. Each test row has a combination of
table, aggregate and comparison that never occurs in training, though each two of them do.
"""

import random
from dataclasses import dataclass
from functools import cache

from lorakit.data.builtin.drawing import Split, draw_rows
from lorakit.data.row_types import PromptRow


@dataclass(frozen=True, kw_only=True)
class SqlTable:
    """Columns of words, with some values, and columns of numbers, with their range."""

    words: dict[str, tuple[str, ...]]
    numbers: dict[str, tuple[int, int]]


CITIES = ("Lisbon", "Oslo", "Turin", "Quito", "Cairo", "Perth")
NAMES = ("Ada", "Boris", "Clara", "Dario", "Elena", "Felix")

TABLES = {
    "ships": SqlTable(words={"port": CITIES}, numbers={"length": (20, 300), "crew_size": (5, 90)}),
    "books": SqlTable(words={"author": NAMES}, numbers={"price": (4, 80), "page_count": (90, 900)}),
    "houses": SqlTable(
        words={"city": CITIES}, numbers={"rent": (300, 900), "garden_area": (10, 90)}
    ),
    "lessons": SqlTable(words={"teacher": NAMES}, numbers={"fee": (5, 60), "room_number": (1, 40)}),
    "bridges": SqlTable(words={"town": CITIES}, numbers={"width": (4, 40), "toll": (1, 20)}),
    "horses": SqlTable(
        words={"owner": NAMES}, numbers={"weight": (200, 900), "race_count": (1, 70)}
    ),
    "concerts": SqlTable(
        words={"hall": CITIES}, numbers={"capacity": (50, 900), "ticket_price": (5, 90)}
    ),
    "parcels": SqlTable(
        words={"sender": NAMES}, numbers={"postage": (2, 50), "item_count": (1, 30)}
    ),
}

AGGREGATES = {
    "MAX": ("largest", "highest"),
    "MIN": ("smallest", "lowest"),
    "AVG": ("average", "mean"),
    "SUM": ("total", "combined"),
}
"""SQL's functions of a column, and how a question asks for them."""

COUNT = "COUNT"
FUNCTIONS = (*AGGREGATES, COUNT)

COMPARISONS = {"=": "is", "!=": "is not", ">": "is above", "<": "is below"}
"""SQL's comparisons, and how a question states them: two for words, two for numbers."""
WORD_COMPARISONS = ("=", "!=")
NUMBER_COMPARISONS = (">", "<")


def rows(split: str, *, seed: int = 0) -> tuple[PromptRow, ...]:
    """The task's train, validation or test rows.

    Raises:
        DataError: there is no such split.
    """
    return draw_rows(_draw, split, seed=seed)


def split_of(table: str, function: str, comparison: str) -> Split:
    """The split that this combination belongs to.

    A row is of a held-out split if one of its combinations is, and has the others from train.
    """
    held_out: dict[int, Split] = {0: "test", 1: "validation"}
    number = (
        list(TABLES).index(table)
        + FUNCTIONS.index(function)
        + 2 * list(COMPARISONS).index(comparison)
    )
    return held_out.get(number % len(TABLES), "train")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A comparison of a column with a value."""

    column: str
    comparison: str
    value: str

    def question(self) -> str:
        """The condition in English."""
        return f"whose {_spoken(self.column)} {COMPARISONS[self.comparison]} {self.value}"

    def sql(self) -> str:
        """The condition in SQL, words in quotes."""
        value = self.value if self.value.isdigit() else f"'{self.value}'"
        return f"{self.column} {self.comparison} {value}"


def _spoken(column: str) -> str:
    return column.replace("_", " ")


def _draw(rng: random.Random, split: Split) -> PromptRow:
    name, function, comparison = rng.choice(_combinations(split))
    conditions = [_condition(rng, name, comparison)]
    if rng.random() < 0.5:
        others = _other_comparisons(name, function, comparison)
        conditions.append(_condition(rng, name, rng.choice(others)))
        rng.shuffle(conditions)
    table = TABLES[name]
    used = {condition.column for condition in conditions}
    aggregated = rng.choice([column for column in table.numbers if column not in used])
    columns = [*table.words, *table.numbers]
    rng.shuffle(columns)
    selected, asked = _selection(rng, name, function, aggregated)
    where = " AND ".join(condition.sql() for condition in conditions)
    which = " and ".join(condition.question() for condition in conditions)
    return PromptRow(
        prompt=f"{name}({', '.join(columns)}): {asked} {which}?",
        completion=f"SELECT {selected} FROM {name} WHERE {where}",
    )


@cache
def _combinations(split: Split) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (table, function, comparison)
        for table in TABLES
        for function in FUNCTIONS
        for comparison in COMPARISONS
        if split_of(table, function, comparison) == split
    )


def _other_comparisons(table: str, function: str, comparison: str) -> list[str]:
    """The comparisons for a second condition: of the other type, and in a training combination."""
    others = NUMBER_COMPARISONS if comparison in WORD_COMPARISONS else WORD_COMPARISONS
    return [other for other in others if split_of(table, function, other) == "train"]


def _condition(rng: random.Random, name: str, comparison: str) -> Condition:
    table = TABLES[name]
    if comparison in WORD_COMPARISONS:
        column = rng.choice(list(table.words))
        return Condition(
            column=column, comparison=comparison, value=rng.choice(table.words[column])
        )
    column = rng.choice(list(table.numbers))
    low, high = table.numbers[column]
    return Condition(column=column, comparison=comparison, value=str(rng.randint(low, high)))


def _selection(rng: random.Random, name: str, function: str, column: str) -> tuple[str, str]:
    """The selection in SQL, and the beginning of the question for it in English."""
    if function == COUNT:
        return "COUNT(*)", f"How many {name} are there"
    word = rng.choice(AGGREGATES[function])
    return f"{function}({column})", f"What is the {word} {_spoken(column)} of {name}"
