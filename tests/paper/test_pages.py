"""Tables, figures and the page of claims, made from results alone; and results scored again."""

import gzip
import json

import pytest

from lorakit.paper import cell as cells_of
from lorakit.paper import results as results_of

MINE = {"best": {"accuracy": 0.75, "matthews": 0.5}, "last": {"accuracy": 0.5, "matthews": 0.25}}


@pytest.fixture
def put(cells, tmp_path):
    """A function that writes a result of the table's row, as if it had been run."""
    from lorakit.data.metrics.score import scorer
    from lorakit.paper.job import jobs_of
    from lorakit.paper.settings import CellChoice

    def write(task="cola", seed=0, scores=MINE, **changes):
        (job,) = jobs_of(CellChoice(cells="table9.lora", tasks=task, seeds=(seed,)))
        known = {
            "status": "done",
            "hash": job.hash,
            "given": job.given,
            "scorer": scorer(task),
            "scores": scores,
            "parameters": {"trained": 99, "without_head": 1_250_000},
            "model": "tiny",
            "seed": seed,
            "commit": "abc",
            "hardware": {"gpu": None, "processor": "a processor", "threads": 1},
        }
        file = results_of.file_of(job, tmp_path / "results")
        results_of.write_result(file, {**known, **changes}, {"best": [1], "last": [0]})

    return write


def test_a_table_has_the_median_of_its_seeds_beside_the_paper_s_value(paper, put):
    put(seed=0)
    put(seed=1, scores={"best": {"matthews": 0.7}, "last": {"matthews": 0.2}})
    code, told = paper("table", "9")
    assert code == 0
    (cola, stsb) = told["rows"]
    assert (cola["ours"], cola["paper"], cola["state"]) == (pytest.approx(60.0), 63.4, "")
    assert (stsb["ours"], stsb["state"]) == (None, "not run")


def test_the_page_of_a_table_names_what_is_stale_missing_or_failed(put, tmp_path, capsys, cells):
    put(seed=0, hash="of other settings")
    put(task="stsb", seed=0, status="failed", error="NaN")
    from lorakit.cli.main import main

    words = ["paper", "table", "9", "--results", str(tmp_path / "results")]
    assert main([*words, "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "table9.small.md").read_text()
    assert "| LoRA | 1.25M | 50.0 (1 stale, 1 not run) | 1 failed, 1 not run |" in page
    assert "| RoB-base LoRA | 0.3M | – | 63.4 ± 1.2 | 91.5 | a test |" in page
    row = "| LoRA | CoLA | 1 | 50.0 (1 stale, 1 not run) | 50.0 | 50.0 | 25.0 |"
    assert f"{row} 63.4 (RoB-base LoRA) | -13.4 |" in page
    assert "median over seeds, best evaluation; model tiny; seeds 0; commit abc;" in page.lower()
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == page.strip()


def test_a_table_or_a_figure_that_is_not_there_is_named(paper):
    assert "there is no table '8'; there are 9" in paper("table", "8")[1]["error"]["message"]
    assert "there is no figure '1'" in paper("figure", "1")[1]["error"]["message"]


@pytest.mark.thorough
def test_stored_outputs_are_scored_again_and_differences_named(paper, finished, data):
    words = ("table9", "--seeds", "0", "--data", data)
    assert paper("verify", *words) == (0, {"scored": 2, "differences": {}})
    file = finished / "cola" / "seed-0.json"
    result = json.loads(file.read_text())
    result["scores"]["last"]["accuracy"] = 0.123
    file.write_text(json.dumps(result))
    packed = finished / "stsb" / "seed-0.predictions.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"row": 1, "last": 0.5}\n'))
    code, told = paper("verify", *words)
    message = told["error"]["message"]
    assert (code, "of 2 results these are not as they say (2 problems)" in message) == (2, True)
    assert "the result says 0.123" in message
    assert "has not the rows 0 to 0 in their order" in message
    (data / "cola" / "validation.jsonl").write_text('{"sentence": "red", "label": 1}\n')
    assert "the rows (score) are not those of the result" in str(paper("verify", *words)[1])


FIGURE = """
title: Score against trained parameters
rows: [lora]
columns:
  mnli: {title: CoLA, task: cola, score: matthews, factor: 100}
beside: table9
seeds: [0]
over: mean
small: {model: minilm, seeds: [0, 1], tasks: {cola: {}}}
"""


@pytest.mark.thorough
def test_a_figure_has_the_paper_s_points_and_ours_and_is_drawn_the_same_each_time(
    paper, put, cells, tmp_path
):
    pytest.importorskip("matplotlib")
    (cells / "figure9").mkdir()
    (cells / "figure9" / "table.yaml").write_text(FIGURE)
    (cells / "figure9" / "lora.yaml").write_text((cells / "table9" / "lora.yaml").read_text())
    cells_of.tables.cache_clear()
    cells_of.cells.cache_clear()
    put()
    told = paper("figure", "9")[1]
    assert told["points"] == [
        {"panel": "the paper, GPT-3 175B, CoLA", "method": "LoRA", "parameters": 300_000}
        | {"score": 63.4}
    ]
    drawn = tmp_path / "drawn"
    paper("figure", "9", "--out", drawn)
    first = {file.name: file.read_bytes() for file in drawn.iterdir()}
    assert sorted(first) == ["figure9.small.png", "figure9.small.svg"]
    paper("figure", "9", "--out", drawn)
    assert {file.name: file.read_bytes() for file in drawn.iterdir()} == first
