"""Results as tables, the pages that show them, and the file of all goals of the server:
`python -m lorakit.bench.tables`."""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.bench.result import OURS

PAGES = (
    Path("README.md"),
    *(Path(f"docs/{name}.md") for name in ("benchmarks", "methods", "models", "estimate")),
)
"""The pages of this repository, from its root."""
RESULTS = Path("benchmarks/results")
"""The folder of the results."""
SERVER_GOALS = "server_goals.json"
"""The file there with all goals of the server."""
NOT_MEASURED = "Not measured yet."
OTHERS = ("rooms", "paper")
"""What docs/rooms.py and `lorakit paper` write between such marks."""
MISSED = {
    "missed_by_the_server": {
        "float32": ("serve", "soak"),
        "bfloat16": ("serve_bf16", "soak_bf16"),
    }
}
"""Tables of the goals that were missed: the results which they are of, by the base's precision."""


def table(result: dict[str, Any]) -> str:
    """A benchmark's result as Markdown: goals, times, memory, more figures and checks."""
    more = map(_more, result.get("tables", {}).values())
    parts = [_goals(result), _seconds(result), _memory(result), *more, _checks(result)]
    parts.append(_where(result))
    return "\n\n".join(part for part in parts if part)


def rewritten(page: str, results: Path) -> str:
    """A page with a fresh table between <!-- NAME --> and <!-- end of NAME -->.

    The table of NAME is that of NAME.json in the folder of results, or one of `MISSED`.
    """

    def result_of(name: str) -> dict[str, Any] | None:
        file = results / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def fresh(found: re.Match[str]) -> str:
        name = found["name"]
        if name in OTHERS:
            return found[0]
        if name in MISSED:
            made = _missed(
                {
                    precision: [each for each in map(result_of, names) if each]
                    for precision, names in MISSED[name].items()
                }
            )
        else:
            result = result_of(name)
            made = table(result) if result else ""
        return f"{found['start']}\n{made or NOT_MEASURED}\n{found['end']}"

    marked = r"(?P<start><!-- (?P<name>\w+) -->)\n.*?(?P<end><!-- end of (?P=name) -->)"
    return re.sub(marked, fresh, page, flags=re.DOTALL)


def server_goals(results: Path) -> list[dict[str, Any]]:
    """Each goal of the server in each precision: its limit, what was got, and in which result."""
    files = [
        (precision, results / f"{name}.json")
        for precision, names in MISSED["missed_by_the_server"].items()
        for name in names
    ]
    return [
        {"precision": precision, **goal, "result": file.name}
        for precision, file in files
        if file.is_file()
        for goal in json.loads(file.read_text(encoding="utf-8"))["goals"]
    ]


def duration(seconds: float) -> str:
    """A time with three digits, in the unit that suits it."""
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds >= 100:
        return f"{seconds:.0f} s"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _goals(result: dict[str, Any]) -> str:
    rows = [(*_goal(goal), "yes" if goal["met"] else "no") for goal in result["goals"]]
    return _markdown(("goal", "limit", "got", "reached"), rows)


def _missed(results: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """The goals of several results, by precision, that were missed in one of them.

    What the counts of a run change in the words of a goal does not make it another goal.
    """
    goals: dict[str, dict[str, dict[str, Any]]] = {}
    for precision, each in results.items():
        for goal in (goal for result in each for goal in result["goals"]):
            goals.setdefault(re.sub(r"[\d,]*\d", "0", goal["what"]), {})[precision] = goal
    rows = []
    for own in goals.values():
        if all(goal["met"] for goal in own.values()):
            continue
        limits = dict.fromkeys(_goal(goal)[1] for goal in own.values())
        got = [_got(own[precision]) if precision in own else "" for precision in results]
        rows.append((next(iter(own.values()))["what"], " / ".join(limits), *got))
    return _markdown(("missed", "limit", *results), rows)


def _got(goal: dict[str, Any]) -> str:
    amount = _goal(goal)[2]
    return f"{amount}, reached" if goal["met"] else amount


def _goal(goal: dict[str, Any]) -> tuple[str, str, str]:
    """What was to be reached, its limit, and what was."""
    side = "at_least" if "at_least" in goal else "at_most"
    limit = f"{side.replace('_', ' ')} {_amount(goal[side], goal)}"
    return goal["what"], limit, _amount(goal["got"], goal)


def _amount(value: float, goal: dict[str, Any]) -> str:
    return f"{value:.3g}x" if goal["unit"] == "x" else f"{value:.3g} {goal['unit']}"


def _seconds(result: dict[str, Any]) -> str:
    rows = [
        (
            what.replace("_", " "),
            who,
            duration(seconds["median"]),
            duration(seconds["minimum"]),
            "" if who == OURS else f"{result['ratios'][who][what]:.3g}x",
        )
        for what, each in result["seconds"].items()
        for who, seconds in each.items()
    ]
    return _markdown(("measured", "who", "median", "fastest", "time of ours"), rows)


def _memory(result: dict[str, Any]) -> str:
    rows = [(who, f"{size / 1e6:.0f} MB") for who, size in result["memory_bytes"].items()]
    kind = "most GPU memory" if result["hardware"].get("gpu") else "largest resident set"
    return _markdown(("who", kind), rows)


UNITS: dict[str, Callable[[float], str]] = {
    "_s": lambda seconds: duration(seconds),
    "_bytes": lambda size: f"{size / 1e6:.0f} MB",
    "_percent": lambda share: f"{share:.3g} %",
}
"""The format of a column's values, by the end of its name, which its head leaves out."""


def _more(rows: Sequence[Mapping[str, Any]]) -> str:
    """One of the result's further tables; none where it has no rows."""
    if not rows:
        return ""
    heads = [
        next((column.removesuffix(unit) for unit in UNITS if column.endswith(unit)), column)
        for column in rows[0]
    ]
    return _markdown(heads, [[_cell(column, row[column]) for column in row] for row in rows])


def _cell(column: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    write = next((write for unit, write in UNITS.items() if column.endswith(unit)), None)
    if write is not None:
        return write(value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _checks(result: dict[str, Any]) -> str:
    words = (
        f"{what.replace('_', ' ')}: {_word(value)}" for what, value in result["checks"].items()
    )
    return "; ".join(words)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:.2g}" if isinstance(value, float) else f"{value:,}"


def _where(result: dict[str, Any]) -> str:
    """The line of what was measured, on which hardware, with which libraries and commit."""
    settings, hardware, versions = (result[key] for key in ("settings", "hardware", "versions"))
    names = ("lorakit", "torch", "transformers", "peft")
    libraries = ", ".join(f"{name} {versions[name]}" for name in names if versions[name])
    models = settings.get("families") or ([settings["model"]] if "model" in settings else [])
    if "holes" in settings:
        # Each run has a model and a precision of its own.
        models = []
    what = " and ".join(Path(each).name for each in models)
    what = f"{what} in {settings['dtype']}, " if what else ""
    return (
        f"{what}{_how(settings)}; "
        f"{hardware['processor']}, {hardware['threads']} threads; {libraries}; "
        f"{_source(result)}."
    )


def _source(result: dict[str, Any]) -> str:
    """The commit that was measured, or the version where it was an installed package."""
    commit = result["commit"]
    return f"commit {commit}" if commit else f"version {result['versions']['lorakit']}"


def _how(settings: dict[str, Any]) -> str:
    """The settings, in a few words."""
    if "holes" in settings:
        steps = f"{settings['steps']} steps of each run that does not say how many"
        return f"{steps}, in a process of its own"
    if "families" in settings:
        return "adapters of rank 2 on all linear layers"
    if "methods" in settings:
        return (
            f"{settings['steps']} steps of {_rows(settings)}, seed {settings['seed']}, "
            f"{settings['parallel']} at a time"
        )
    often = (
        f"{settings['requests']:,} requests of {settings['connections']} clients"
        if "requests" in settings
        else f"{settings['repeats']} rounds"
    )
    return (
        f"adapters of rank {settings['rank']} in {settings['adapter_dtype']}"
        f"{_trained_on(settings)}, {often}"
    )


def _trained_on(settings: dict[str, Any]) -> str:
    """The adapted layers and the rows, where the settings have them."""
    if "targets" not in settings or "data" not in settings:
        return ""
    return f" on {', '.join(settings['targets'])}, {_rows(settings)} in a step"


def _rows(settings: dict[str, Any]) -> str:
    """The number of rows in a step, and their file."""
    source = "/".join(Path(settings["data"]["train"]).parts[-2:])
    return f"{settings['batch_size']} rows of {source}"


def _markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned in plain text too; "" without rows."""
    rows = [heads, *rows]
    if len(rows) == 1:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (" | ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    """Rewrite the tables of the pages from the folder of the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("pages", type=Path, nargs="*", default=PAGES, help="(default: all)")
    given = parser.parse_args()
    for page in given.pages:
        text = rewritten(page.read_text(encoding="utf-8"), given.results)
        page.write_text(text, encoding="utf-8")
    goals = server_goals(given.results)
    if goals:
        text = json.dumps(goals, indent=2) + "\n"
        (given.results / SERVER_GOALS).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
