"""The comparison of methods: each is trained, scored on held-out rows, and named in one table."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorakit.bench import methods
from lorakit.bench.tables import table
from lorakit.cli.main import main
from lorakit.errors import MissingExtraError

SMALL = ("--steps", "25", "--batch-size", "2", "--data.max-length", "16", "--dtype", "float32")


@pytest.fixture
def compare(tiny_llama, prompt_rows, capsys, monkeypatch):
    """A function that compares methods on a tiny model, and gives back code and output."""
    monkeypatch.setattr(methods, "_workers", ThreadPoolExecutor)  # a process takes seconds to start

    def run(*words):
        given = ["--model", tiny_llama, "--data.train", prompt_rows, "--data.validation"]
        given += [prompt_rows, *SMALL, *words, "--json"]
        code = main(["bench", "methods", *map(str, given)])
        return code, capsys.readouterr()

    return run


@pytest.mark.thorough
def test_each_run_has_a_row_with_its_scores_beside_the_base_s(compare):
    asked = {"lora": {}, "wide": {"method": "lora", "lora": {"rank": 4}}}
    code, printed = compare(
        *(
            "--methods",
            json.dumps(asked),
            "--rates",
            json.dumps({name: [1e-3, 1e-1] for name in asked}),
            "--answers",
            2,
        ),
        *("--max-new-tokens", 3),
    )
    assert code == 0
    result = json.loads(printed.out)
    rows = result["tables"]["methods"]
    assert [(row["method"], row["learning rate"]) for row in rows] == [
        ("base", None),
        *[(name, rate) for name in asked for rate in (1e-3, 1e-1)],
    ]
    base, slow, fast, *_ = rows
    assert slow["held-out loss"] != fast["held-out loss"] != base["held-out loss"]
    assert {"BLEU", "time_s", "memory_bytes"} <= slow.keys()
    assert rows[3]["trained"] != slow["trained"]
    lowest = {name: min(r["held-out loss"] for r in rows if r["method"] == name) for name in asked}
    assert {row["method"]: row["held-out loss"] for row in result["tables"]["best"]} == lowest
    assert "2 rows of" in table(result)


def test_every_wrong_setting_is_told_before_anything_is_trained(compare):
    asked = {"lora": {"lora": {"rank": 0}}, "lorra": {}, "mine": {"method": "lora"}}
    code, printed = compare("--methods", json.dumps(asked), "--rates", '{"dora": [1.0]}')
    assert code == 2
    assert "lora: " in printed.err
    assert "lorra: " in printed.err
    assert "mine: " not in printed.err
    assert "rates: dora is not among the methods" in printed.err


@pytest.mark.thorough
def test_a_run_that_is_stopped_ends_alone_and_is_named(compare):
    code, printed = compare("--methods", '{"lora": {}}', "--rates", '{"lora": [1e-3, 1e30]}')
    assert code == 0
    result = json.loads(printed.out)
    assert [row["learning rate"] for row in result["tables"]["methods"]] == [None, 1e-3]
    assert set(result["checks"]) == {"stopped, lora at 1e+30"}
    assert "lora at 1e+30: " in printed.err
    assert "lora at 0.001: {" in printed.err
    assert "stopped, lora at 1e+30: " in table(result)


def test_an_error_of_a_worker_says_the_same_in_its_parent():
    error = MissingExtraError("a quantised base", "quantized")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.thorough
def test_where_no_method_comes_to_its_end_the_first_error_is_told(compare):
    code, printed = compare("--methods", '{"lora": {}}', "--rates", '{"lora": [1e29, 1e30]}')
    assert code == 2
    assert "The adapter as it last was good" in json.loads(printed.out)["error"]["message"]


def test_a_defect_ends_all_runs_at_once(compare, monkeypatch):
    begun = []

    def fail(settings, entry):
        begun.append(entry.name)
        raise RuntimeError("a defect")

    monkeypatch.setattr(methods, "_measured", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        compare("--parallel", 1)
    assert len(begun) < 5


@pytest.mark.thorough
def test_scores_of_numbers_can_be_compared_too(compare, tiny_bert, tmp_path):
    rows = tmp_path / "scores.jsonl"
    lines = [{"text": f"red {word}", "label": 0.5 * n} for n, word in enumerate(("cat", "dog") * 8)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, printed = compare(
        *("--model", tiny_bert, "--data.train", rows, "--data.validation", rows),
        *("--task", "regression", "--methods", '{"lora": {}}'),
    )
    assert code == 0
    base, lora = json.loads(printed.out)["tables"]["methods"]
    assert lora["held-out loss"] < base["held-out loss"]
