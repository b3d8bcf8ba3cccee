"""WikiSQL 1.1 (Zhong et al., 2017): a question about a table to a query.

The paper gives the table's schema and the question, and does not say in which form; here it is one
line for the columns and one for the question. A query is written with the columns' names, and read
back into `sel`, `agg` and `conds`, which the scorer compares.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.data.metrics.wikisql import AGGREGATIONS, OPERATORS
from lorakit.data.row_types import PromptRow, Row
from lorakit.data.tasks.task import Task, Values, splits, with_references

Query = Mapping[str, Any]


def prompt(question: str, header: Sequence[str]) -> str:
    """What the model is given: the table's columns and the question."""
    return f"Columns: {', '.join(header)}\nQuestion: {question}\nSQL:"


def written(query: Query, header: Sequence[str]) -> str:
    """A query as text.

    >>> written({"sel": 1, "agg": 1, "conds": [[0, 1, "4"]]}, ["year", "score"])
    "SELECT MAX(score) FROM table WHERE year > '4'"

    Raises:
        IndexError: a number of a column, aggregation or operator does not exist.
    """
    column, aggregation = header[query["sel"]], AGGREGATIONS[query["agg"]]
    selected = f"{aggregation}({column})" if aggregation else column
    conditions = " AND ".join(
        f"{header[index]} {OPERATORS[operator]} '{value}'"
        for index, operator, value in query["conds"]
    )
    return f"SELECT {selected} FROM table" + (f" WHERE {conditions}" if conditions else "")


def read(text: str, header: Sequence[str]) -> dict[str, Any] | None:
    """The query that a text writes; None where it is none of this table.

    >>> read("SELECT MAX(score) FROM table WHERE year > '4'", ["year", "score"])
    {'sel': 1, 'agg': 1, 'conds': [[0, 1, '4']]}
    """
    columns = {name.lower().strip(): index for index, name in reversed(list(enumerate(header)))}
    match = re.fullmatch(r"SELECT (.+?) FROM table(?: WHERE (.+))?", text.strip(), re.DOTALL)
    if match is None:
        return None
    selected, conditions = match.groups()
    aggregated = re.fullmatch(rf"({'|'.join(AGGREGATIONS[1:])})\((.+)\)", selected, re.DOTALL)
    aggregation, column = aggregated.groups() if aggregated else ("", selected)
    known = _conditions(conditions, columns) if conditions else []
    if column.lower().strip() not in columns or known is None:
        return None
    agg = AGGREGATIONS.index(aggregation)
    return {"sel": columns[column.lower().strip()], "agg": agg, "conds": known}


def _conditions(text: str, columns: Mapping[str, int]) -> list[list[Any]] | None:
    """The conditions of a WHERE; a value may hold quotes, so it ends before AND or at the end."""
    names = "|".join(re.escape(name) for name in sorted(columns, key=len, reverse=True))
    one = re.compile(rf"({names}) ([=<>]) '(.*?)'(?: AND (?=(?:{names}) [=<>] ')|$)", re.I | re.S)
    found: list[list[Any]] = []
    place = 0
    while place < len(text):
        match = one.match(text, place)
        if match is None:
            return None
        name, operator, value = match.groups()
        found.append([columns[name.lower()], OPERATORS.index(operator), value])
        place = match.end()
    return found


def query_of(values: Values) -> dict[str, Any]:
    """The right query of a raw row."""
    sql = values["sql"]
    conditions = sql["conds"]
    if isinstance(conditions, Mapping):
        names = ("column_index", "operator_index", "condition")
        conditions = [list(one) for one in zip(*(conditions[n] for n in names), strict=True)]
    return {"sel": sql["sel"], "agg": sql["agg"], "conds": conditions}


def _row(values: Values) -> Row:
    header = values["table"]["header"]
    query = query_of(values)
    row = with_references(prompt(values["question"], header), [written(query, header)])
    return replace(row, values={"query": query, "table": values["table"]})


def _query_in(answer: str, row: Row) -> dict[str, Any] | None:
    assert isinstance(row, PromptRow)
    return read(answer, row.values["table"]["header"])


def _right_query(row: Row) -> Any:
    assert isinstance(row, PromptRow)
    return row.values["query"]


def _tables(rows: Sequence[Row]) -> dict[str, list[Values]]:
    """The table of each row, with its types and its rows, unless the data is without them."""
    tables = [row.values["table"] for row in rows if isinstance(row, PromptRow)]
    complete = all("types" in table and "rows" in table for table in tables)
    return {"tables": tables} if complete else {}


TASK = Task(
    name="wikisql",
    hub="Salesforce/wikisql",
    splits=splits(train=56_355, validation=8_421, test=15_878),
    row=_row,
    output=_query_in,
    reference=_right_query,
    beside=_tables,
)
