import hashlib
import re

import pytest

from lorakit.config.train import DataConfig
from lorakit.data.builtin import BUILTIN, builtin_task, places, sql
from lorakit.data.builtin.places import Place
from lorakit.data.row_types import PromptRow
from lorakit.data.rows import read_rows
from lorakit.errors import DataError

SPLITS = ("train", "validation", "test")
Combination = tuple[str, ...]


def place_of(row: PromptRow) -> Place:
    return Place(**dict(part.split(": ") for part in row.prompt.split(", ")))


def query_of(row: PromptRow) -> tuple[str, str, list[str]]:
    """The table, the function and the comparisons of a row's SQL."""
    found = re.fullmatch(r"SELECT ([A-Z]+)\((?:\w+|\*)\) FROM (\w+) WHERE (.+)", row.completion)
    assert found
    function, table, where = found.groups()
    return table, function, re.findall(r" (=|!=|<|>) ", where)


def place_combinations(row: PromptRow) -> set[Combination]:
    place = place_of(row)
    return {(place.kind, place.area)}


def sql_combinations(row: PromptRow) -> set[Combination]:
    table, function, comparisons = query_of(row)
    return {(table, function, comparison) for comparison in comparisons}


COMBINATIONS = {"places": place_combinations, "sql": sql_combinations}


@pytest.mark.parametrize("name", BUILTIN)
def test_each_split_has_distinct_rows_of_its_own(name: str) -> None:
    splits = {split: BUILTIN[name].rows(split) for split in SPLITS}
    assert [len(rows) for rows in splits.values()] == [2000, 200, 200]
    prompts = [row.prompt for rows in splits.values() for row in rows]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", BUILTIN)
def test_held_out_rows_have_combinations_that_training_never_has(name: str) -> None:
    of = COMBINATIONS[name]
    seen = {split: [of(row) for row in BUILTIN[name].rows(split)] for split in SPLITS}
    train = set.union(*seen["train"])
    for split in ("validation", "test"):
        assert all(combinations - train for combinations in seen[split])
    held_out = [set.union(*seen[split]) - train for split in ("validation", "test")]
    assert not held_out[0] & held_out[1]


@pytest.mark.parametrize("name", BUILTIN)
def test_every_part_of_a_held_out_combination_occurs_in_training(name: str) -> None:
    of = COMBINATIONS[name]
    train = set.union(*(of(row) for row in BUILTIN[name].rows("train")))
    for split in ("validation", "test"):
        held_out = set.union(*(of(row) for row in BUILTIN[name].rows(split)))
        for position in range(len(next(iter(held_out)))):
            assert {c[position] for c in held_out} <= {c[position] for c in train}


@pytest.mark.parametrize("name", BUILTIN)
def test_the_seed_decides_the_rows(name: str) -> None:
    task = BUILTIN[name]
    assert task.rows("test", seed=3) == task.rows("test", seed=3)
    assert task.rows("test", seed=3) != task.rows("test", seed=4)


@pytest.mark.parametrize(
    ("name", "digest"), [("places", "29f791544debb4ca"), ("sql", "fdf5d4769e22e63b")]
)
def test_the_rows_stay_what_they_are(name: str, digest: str) -> None:
    """Scores are comparable only while nobody changes the grammar without knowing it."""
    text = "\n".join(f"{row.prompt}\t{row.completion}" for row in BUILTIN[name].rows("test"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_a_meaning_has_one_target_which_is_the_first_of_its_references() -> None:
    rows = places.rows("train")
    assert all(row.completion == row.references[0] for row in rows)
    assert all(places.sentences(place_of(row)) == row.references for row in rows)
    assert all(len(set(row.references)) == len(row.references) >= 2 for row in rows)


@pytest.mark.parametrize(
    ("said", "first"),
    [
        (
            {"cost": "low", "hours": "late", "dogs": "no"},
            "Ivory Mill is a cheap park by the canal that stays open until midnight and does not"
            " admit dogs.",
        ),
        (
            {"hours": "early", "dogs": "yes"},
            "Ivory Mill, a park by the canal, opens at dawn and welcomes dogs.",
        ),
        (
            {"cost": "high", "dogs": "yes", "known": "oak trees"},
            "Known for its oak trees, Ivory Mill is a costly park by the canal that welcomes dogs.",
        ),
    ],
)
def test_what_is_said_of_a_place_decides_the_sentence(said: dict[str, str], first: str) -> None:
    place = Place(name="Ivory Mill", kind="park", area="canal", **said)
    assert places.sentences(place)[0] == first


def test_three_clauses_are_joined_as_english_does() -> None:
    place = Place(
        name="A B", kind="park", area="canal", hours="daily", dogs="yes", known="oak trees"
    )
    assert places.sentences(place)[1] == (
        "A B is a park by the canal that is open every day, welcomes dogs and is known for its oak"
        " trees."
    )


@pytest.mark.parametrize("split", SPLITS)
def test_a_query_uses_the_columns_of_its_table_and_the_values_of_its_question(split: str) -> None:
    for row in sql.rows(split):
        table, question = row.prompt.split(": ", 1)
        name, columns = re.fullmatch(r"(\w+)\((.+)\)", table).groups()
        assert set(columns.split(", ")) == {*sql.TABLES[name].words, *sql.TABLES[name].numbers}
        assert f" FROM {name} WHERE " in row.completion
        conditions = row.completion.split(" WHERE ")[1].split(" AND ")
        for condition in conditions:
            column, _, value = condition.split(" ")
            assert column in columns.split(", ")
            assert f"{column.replace('_', ' ')} is" in question
            assert f" {value.strip(chr(39))}" in question
        asked = [re.escape(condition.split(" ")[2].strip("'")) for condition in conditions]
        assert re.search(".*".join(asked), question)


def test_columns_come_in_any_order() -> None:
    orders = {row.prompt.split(":")[0] for row in sql.rows("train") if row.prompt[:5] == "ships"}
    assert len(orders) == 6


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'place'; did you mean 'places'\?.*are places, sql\."):
        builtin_task("place")
    with pytest.raises(DataError, match="The splits are train, validation, test"):
        places.rows("dev")


def test_builtin_rows_are_read_by_name_split_and_limit() -> None:
    data = DataConfig()
    assert read_rows("builtin:sql", data).rows == sql.rows("train")
    assert read_rows("builtin:sql", data, split="validation").rows == sql.rows("validation")
    assert read_rows("builtin:sql:test", data, limit=7).rows == sql.rows("test")[:7]
    with pytest.raises(DataError, match=r"has prompt rows, but data.format is text"):
        read_rows("builtin:sql", DataConfig(format="text"))
    with pytest.raises(DataError, match="No built-in task is called 'xyz'"):
        read_rows("builtin:xyz", data)
