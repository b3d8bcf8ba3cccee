"""Results as tables, and the page of this repository that has them."""

import json
import re
import sys
from pathlib import Path

import pytest

from lorakit.bench import tables
from lorakit.bench.tables import duration, rewritten, server_goals, table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "benchmarks.md"
RESULTS = DOCS.parent / "benchmarks" / "results"
RESULT = {
    "settings": {
        "model": "/somewhere/smollm2",
        "dtype": "bfloat16",
        "rank": 8,
        "adapter_dtype": "float32",
        "repeats": 7,
    },
    "hardware": {"processor": "a processor", "threads": 2},
    "versions": {"lorakit": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": None},
    "commit": "abc",
    "seconds": {
        "merged_switch": {
            "ours": {"median": 0.05, "minimum": 0.04},
            "peft": {"median": 1.5, "minimum": 1.25},
        }
    },
    "memory_bytes": {"ours": 12_000_000},
    "ratios": {"peft": {"merged_switch": 30.0}},
    "goals": [{"what": "a switch", "at_most": 50.0, "unit": "us", "got": 2.5, "met": True}],
    "checks": {"base_restored": True, "peft_changed_share": 0.0244},
}
TABLE = """\
| goal     | limit         | got    | reached |
| -------- | ------------- | ------ | ------- |
| a switch | at most 50 us | 2.5 us | yes     |

| measured      | who  | median | fastest | time of ours |
| ------------- | ---- | ------ | ------- | ------------ |
| merged switch | ours | 50 ms  | 40 ms   |              |
| merged switch | peft | 1.5 s  | 1.25 s  | 30x          |

| who  | largest resident set |
| ---- | -------------------- |
| ours | 12 MB                |

base restored: yes; peft changed share: 0.024

smollm2 in bfloat16, adapters of rank 8 in float32, 7 rounds; a processor, 2 threads; \
lorakit 0.1.0, torch 2.13.0, transformers 5.23.0; commit abc."""


@pytest.mark.parametrize("name", [str(page) for page in tables.PAGES])
def test_the_page_has_the_tables_of_the_committed_results(name):
    page = (DOCS.parent / name).read_text(encoding="utf-8")
    written = rewritten(page, RESULTS)
    assert page == written, "run `python -m lorakit.bench.tables`"


@pytest.mark.parametrize("column", [("serve", "soak"), ("serve_bf16", "soak_bf16")])
def test_the_first_page_has_each_goal_that_the_server_missed(column):
    page = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in column]
    goals = [goal for result in results for goal in result["goals"]]
    assert f"Of our {len(goals)} [goals]" in page
    written = page.split("<!-- missed_by_the_server -->")[1].split("<!-- end of")[0]
    cells = [
        re.sub(r"[\d,]*\d", "0", line.split("|")[1].strip()) for line in written.splitlines()[3:]
    ]
    for goal in goals:
        if not goal["met"]:
            assert re.sub(r"[\d,]*\d", "0", goal["what"]) in cells


def test_one_file_has_each_goal_of_the_server():
    committed = json.loads((RESULTS / tables.SERVER_GOALS).read_text(encoding="utf-8"))
    assert committed == server_goals(RESULTS), "run `python -m lorakit.bench.tables`"
    assert {(each["precision"], each["result"]) for each in committed} == {
        ("float32", "serve.json"),
        ("float32", "soak.json"),
        ("bfloat16", "serve_bf16.json"),
        ("bfloat16", "soak_bf16.json"),
    }
    assert all({"what", "got", "met"} < each.keys() for each in committed)


def test_a_goal_missed_in_one_precision_is_shown_for_both(tmp_path):
    def result(name, *goals):
        (tmp_path / f"{name}.json").write_text(json.dumps({"goals": goals}), encoding="utf-8")

    slow = {"what": "time of a 429 (of 1,150)", "at_most": 50.0, "unit": "ms"}
    fair = {"what": "answers", "at_least": 1.0, "unit": "x", "got": 2.0, "met": True}
    result("serve", fair, {**slow, "got": 180.0, "met": False})
    result("serve_bf16", fair, {**slow, "what": "time of a 429 (of 9)", "got": 8.0, "met": True})
    page = "<!-- missed_by_the_server -->\n<!-- end of missed_by_the_server -->"
    page = page.replace("-->\n", "-->\nolder\n")
    assert rewritten(page, tmp_path).splitlines()[1:-1] == [
        "| missed                   | limit         | float32 | bfloat16      |",
        "| ------------------------ | ------------- | ------- | ------------- |",
        "| time of a 429 (of 1,150) | at most 50 ms | 180 ms  | 8 ms, reached |",
    ]


@pytest.mark.parametrize("name", ["switch", "load", "mixed", "sweep", "latency"])
def test_the_page_has_a_place_for_each_benchmark_and_its_command(name):
    page = PAGE.read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n" in page
    assert f"\n<!-- end of {name} -->" in page
    out = rf"--out benchmarks/results/{name}\.json"
    assert re.search(rf"^lorakit bench {name} (?:.* )?{out}$", page, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["train", "train_float32", "train_all_linear", "train_compiled"])
def test_the_page_has_a_place_for_each_measurement_of_training(name):
    page = PAGE.read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n" in page
    assert re.search(
        rf"\nlorakit bench \w+ benchmarks/\S+ .*--out benchmarks/results/{name}.json\n", page
    )


def test_a_table_says_goals_times_and_environment():
    assert table(RESULT) == TABLE


def test_the_version_is_said_where_there_is_no_commit():
    assert table({**RESULT, "commit": None}).endswith("; version 0.1.0.")


def test_more_figures_are_written_in_the_units_of_their_columns():
    rows = [
        {"who": "ours", "speed": 1234.5, "step_s": 0.25, "held_bytes": 2_000_000, "rows": 12_345},
        {"who": "peft", "speed": 99.5, "step_s": 1.5, "held_bytes": None, "rows": 1},
    ]
    assert (
        "| who  | speed | step   | held | rows   |\n"
        "| ---- | ----- | ------ | ---- | ------ |\n"
        "| ours | 1234  | 250 ms | 2 MB | 12,345 |\n"
        "| peft | 99.5  | 1.5 s  |      | 1      |\n"
    ) in table({**RESULT, "tables": {"more": rows}})


def test_a_table_without_rows_is_left_out():
    result = RESULT | {"tables": {"reasons": []}}
    assert table(result) == table(RESULT | {"tables": {}})


def test_the_last_line_names_the_models_that_were_asked_for():
    settings = {"model": "tiny", "dtype": "float32", "families": ["minilm", "a/gemma.gguf"]}
    for found, named in (
        (settings, "minilm and gemma.gguf"),
        ({**settings, "families": []}, "tiny"),
    ):
        last = table({**RESULT, "settings": found}).splitlines()[-1]
        assert last.startswith(f"{named} in float32, adapters of rank 2 on all linear layers; ")


def test_only_what_is_between_the_marks_is_rewritten(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- end of x -->\nb\n<!-- y -->\n<!-- end of y -->\nc\n")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "x.json").write_text(json.dumps(RESULT))
    monkeypatch.setattr(sys, "argv", ["tables", str(page), "--results", str(tmp_path / "page")])
    tables.main()
    assert page.read_text() == (
        f"a\n<!-- x -->\n{TABLE}\n<!-- end of x -->\n"
        "b\n<!-- y -->\nNot measured yet.\n<!-- end of y -->\nc\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1002.4, "1002 s"),
        (12.345, "12.3 s"),
        (0.0123, "12.3 ms"),
        (1.69e-6, "1.69 us"),
        (-0.25, "-250 ms"),
    ],
)
def test_a_time_is_written_in_the_unit_that_suits_it(seconds, text):
    assert duration(seconds) == text
