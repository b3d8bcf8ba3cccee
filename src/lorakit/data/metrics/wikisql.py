"""Logical form and execution accuracy of WikiSQL queries, as its official scorer counts them.

A query is a dictionary of `sel` (a column), `agg` (an index of `AGGREGATIONS`) and `conds` (lists
of a column, an index of `OPERATORS`, and a value), as in Zhong et al. (2017).
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping
from typing import Any

AGGREGATIONS = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")

Query = Mapping[str, Any]
WikiSqlTable = Mapping[str, Any]
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_GROUPED = re.compile(r"[-+]?\d{1,3}(,\d{3})*(\.\d+)?|[-+]?\d+(\.\d+)?")


def same_form(output: Query | None, reference: Query, *, ordered: bool = False) -> bool:
    """Whether two queries have the same column, aggregation and conditions.

    Args:
        output: None, or a mapping without `sel`, `agg` or `conds`, is wrong.
        reference: the right query.
        ordered: whether the order of the conditions counts.
    """
    try:
        found = _form(output or {}, ordered=ordered)
    except (KeyError, TypeError, ValueError):
        return False
    return found == _form(reference, ordered=ordered)


def _form(query: Query, *, ordered: bool) -> tuple[Any, ...]:
    conditions = [(col, op, str(value).lower()) for col, op, value in query["conds"]]
    return query["sel"], query["agg"], conditions if ordered else set(conditions)


def same_result(output: Query | None, reference: Query, table: WikiSqlTable) -> bool:
    """Whether two queries have the same result on a table; a query that cannot run is wrong.

    Args:
        output: the query to judge.
        reference: the right query.
        table: `types` (text or real) and `rows`.
    """
    try:
        with sqlite3.connect(":memory:") as database:
            _fill(database, table)
            return _run(database, table, output or {}) == _run(database, table, reference)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, sqlite3.Error):
        return False


def _fill(database: sqlite3.Connection, table: WikiSqlTable) -> None:
    columns = ", ".join(f"col{index} {kind}" for index, kind in enumerate(table["types"]))
    database.execute(f"CREATE TABLE rows ({columns})")
    marks = ", ".join("?" * len(table["types"]))
    lowered = [[v.lower() if isinstance(v, str) else v for v in row] for row in table["rows"]]
    database.executemany(f"INSERT INTO rows VALUES ({marks})", lowered)


def _run(database: sqlite3.Connection, table: WikiSqlTable, query: Query) -> list[tuple[Any, ...]]:
    column = f"col{int(query['sel'])}"
    aggregation = AGGREGATIONS[query["agg"]]
    selected = f"{aggregation}({column})" if aggregation else column
    # As in the official scorer, a column that two conditions name is compared with the last value.
    values: dict[str, Any] = {}
    clauses = []
    for index, operator, value in query["conds"]:
        name = f"col{int(index)}"
        values[name] = _value(value, table["types"][int(index)])
        clauses.append(f"{name} {OPERATORS[operator]} :{name}")
    where = f" WHERE {' AND '.join(clauses)}" if clauses else ""
    return database.execute(f"SELECT {selected} FROM rows{where}", values).fetchall()


def _value(value: Any, kind: str) -> Any:
    """A condition's value: text in lower case; of a real column the number that it holds."""
    if isinstance(value, str):
        value = value.lower()
    if kind == "real" and not isinstance(value, (int, float)):
        if _GROUPED.fullmatch(value):
            return float(value.replace(",", ""))
        return float(_NUMBER.findall(value)[0])
    return value
