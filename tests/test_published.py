"""The figures beside PEFT that README and docs/compare.md publish are those of the results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "GB": 1e9, "%": 0.01, "": 1.0}


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def seconds(name, what):
    times = result(name)["seconds"][what]
    return [times[who]["median"] for who in ("ours", "peft")]


def speeds(name):
    """Tokens per second: of ours, PEFT, and PEFT at its best, where that has been measured."""
    rows = {row["who"]: row for row in result(name)["tables"]["contestants"]}
    names = ("ours", "peft", "peft_by_length")
    return [rows[who]["useful tokens per second"] for who in names if who in rows]


def memory():
    used = result("train_float32")["memory_bytes"]
    return [used[who] for who in ("ours", "peft", "peft_by_length")]


def changed():
    return result("switch")["checks"]["peft_changed_share"]


FIGURES = [
    ("training, useful tokens per second", lambda: speeds("train_float32")),
    ("the same in bfloat16", lambda: speeds("train")),
    ("memory of that training", memory),
    ("16 rows with 16 adapters, 32 tokens each", lambda: seconds("mixed", "decode")),
    ("switch to another adapter", lambda: seconds("switch", "unmerged_switch")),
    ("switch while merged", lambda: seconds("switch", "merged_switch")),
    ("load an adapter", lambda: seconds("load", "load_first")),
    ("a training step of eight adapters", lambda: seconds("sweep", "step")),
]


def figures(page, label):
    """The figures in the row of a table that begins with a label; none where no row does."""
    text = (ROOT / page).read_text(encoding="utf-8")
    row = re.search(rf"^\| {label}\b[^|]*\|(.*)\|$", text, flags=re.MULTILINE)
    cells = row[1].split("|") if row else []
    found = [re.match(r"([\d.]+) ?(µs|ms|s|GB|%|)(?=,| |$)", cell.strip()) for cell in cells]
    return [float(each[1]) * UNITS[each[2]] for each in found if each]


# README has some of them.
PUBLISHED = [
    *(("docs/compare.md", *figure) for figure in FIGURES),
    *(("README.md", *figure) for figure in FIGURES if figures("README.md", figure[0])),
]


def test_readme_has_figures():
    assert len(PUBLISHED) > len(FIGURES)


@pytest.mark.parametrize(("page", "label", "measured"), PUBLISHED)
def test_published_figures_are_those_of_the_results(page, label, measured):
    assert figures(page, label) == pytest.approx(measured(), rel=0.015)


def test_the_share_of_values_that_peft_does_not_restore_is_that_of_the_result():
    for page in ("README.md", "docs/compare.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"{100 * changed():.1f} % of " in text
