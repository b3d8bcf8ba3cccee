"""`lorakit paper run` on a tiny model and a few rows: results, staleness, resumption, mistakes."""

import gzip
import json

import pytest

import lorakit as lk
from lorakit.errors import TrainingError
from lorakit.paper import check, durations, run


def states(told):
    return [(each["task"], each["seed"], each["state"]) for each in told["runs"]]


def test_a_cell_is_run_once_and_its_results_can_be_scored_again(paper, finished, data):
    file = finished / "cola" / "seed-0.json"
    result = json.loads(file.read_text())
    assert [entry["step"] for entry in result["evaluations"]] == [2, 4]
    assert result["scores"].keys() == {"best", "last"}
    assert (result["steps"], result["data"]["score"]["rows"]) == (4, 16)
    assert result["parameters"]["without_head"] < result["parameters"]["trained"]
    assert result["commit"]
    assert {"versions", "hardware", "seconds", "peak_memory_bytes", "settings"} <= result.keys()

    text = gzip.decompress(file.with_name("seed-0.predictions.jsonl.gz").read_bytes()).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["row"] for line in lines] == list(range(16))
    lines_of_data = (data / "cola" / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines_of_data[:16]]
    right = [row["label"] for row in rows]
    assert lk.score("cola", [line["last"] for line in lines], right) == result["scores"]["last"]
    assert not any(row["sentence"] in text for row in rows)
    # The second time nothing is trained.
    before = file.stat().st_mtime_ns
    assert paper("run", "table9.lora", "--seeds", "0")[0] == 0
    assert file.stat().st_mtime_ns == before


def test_a_result_is_stale_when_its_cell_its_rows_or_its_scorer_have_changed(
    paper, finished, data, change_row, monkeypatch
):
    words = ("table9.lora", "--tasks", "cola", "--seeds", "0")
    assert states(paper("list", *words)[1]) == [("cola", 0, "done")]
    change_row("rank: 2", "rank: 3")
    (told,) = paper("list", *words)[1]["runs"]
    assert (told["state"], told["why"]) == ("stale", "settings (train.lora.rank)")
    change_row("rank: 3", "rank: 2")
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.data.metrics.score.VERSION", 99)
        assert paper("list", *words)[1]["runs"][0]["why"] == "scorer"
    file = data / "cola" / "train.jsonl"
    file.write_text(file.read_text().replace("red", "blue"))
    dry = paper("run", *words, "--dry-run")[1]
    assert (dry["runs"][0]["state"], dry["runs"][0]["why"]) == ("stale", "rows of train")
    assert states(paper("run", *words, "--threads", "2")[1]) == [("cola", 0, "done")]
    result = json.loads((finished / "cola" / "seed-0.json").read_text())
    assert result["hardware"]["threads"] == 2


def test_an_interrupted_run_goes_on_where_it_stopped(paper, finished, monkeypatch):
    words = ("table9.lora", "--tasks", "cola", "--seeds", "0")
    file = finished / "cola" / "seed-0.json"
    whole = json.loads(file.read_text())
    file.unlink()

    from lorakit.training.trainer import AdapterTrainer

    step = AdapterTrainer.training_step
    done = []

    def stop_at_the_third(self, *args, **kwargs):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt("stopped")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", stop_at_the_third)
        code, told = paper("run", *words)
    assert (code, "run the same command to go on" in told["error"]["message"]) == (130, True)
    assert not file.exists()
    trained = []

    def count(self, *args, **kwargs):
        trained.append(1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", count)
    assert paper("run", *words)[0] == 0
    again = json.loads(file.read_text())
    assert len(trained) == 2
    assert (again["scores"], again["evaluations"]) == (whole["scores"], whole["evaluations"])


@pytest.mark.thorough
def test_a_run_that_diverges_is_a_result_and_the_others_go_on(paper, monkeypatch):
    train = lk.train

    def diverge(config, **how):
        if config.seed == 0:
            raise TrainingError("the loss is NaN at step 3")
        return train(config, **how)

    monkeypatch.setattr(run, "train", diverge)
    words = ("table9.lora", "--tasks", "cola")
    assert states(paper("run", *words)[1]) == [("cola", 0, "failed"), ("cola", 1, "done")]
    assert paper("list", *words)[1]["runs"][0]["why"] == "the loss is NaN at step 3"


def test_all_that_is_missing_is_told_before_the_first_run(paper, data, monkeypatch, tmp_path):
    (data / "cola" / "train.jsonl").write_text('{"sentence": "a cat", "label": 7}\n')
    (data / "stsb" / "validation.jsonl").unlink()
    monkeypatch.setattr(check, "uncommitted", lambda: ["a.py"])
    (tmp_path / "work").write_text("a file")
    code, told = paper("run", "table9")
    message = told["error"]["message"]
    assert (code, told["error"]["type"]) == (2, "ConfigError")
    assert "label 7 is none of 0 to 1 (unacceptable, acceptable)" in message
    assert "has no validation.jsonl, the split validation of stsb; it has train" in message
    assert "a.py has uncommitted changes" in message
    assert f"{tmp_path / 'work'} is a file" in message
    assert not (tmp_path / "results").exists()


def test_rows_that_are_fewer_than_published_are_named(paper):
    told = paper("run", "table9.lora", "--tasks", "cola", "--dry-run")[1]
    assert told["notes"] == ["cola, train: 32 of 8,551 as published"]
    assert [each["state"] for each in told["runs"]] == ["not run", "not run"]


def test_all_mistakes_of_a_command_are_one_message(paper, tmp_path):
    code, told = paper("run", "table9", "tabel9", "--tasks", "cola,coal", "--joint", 0)
    message = told["error"]["message"]
    assert code == 2
    assert "(3 problems)" in message
    assert "there is no cell 'tabel9'; did you mean 'table9'?" in message
    assert "there is no task 'coal'; did you mean 'cola'?" in message
    assert "joint: " in message
    nowhere = tmp_path / "nowhere"
    code, told = paper("run", "table9", "--model", "gpt2-medium", "--data", nowhere)
    assert (code, told["error"]["message"].count("\n")) == (2, 2)
    assert "model and variant are of --scale full" in told["error"]["message"]
    assert f"there is no folder {nowhere}" in told["error"]["message"]


def test_a_folder_that_is_not_there_is_one_problem(paper, tmp_path):
    code, told = paper("run", "table9", "--data", tmp_path / "nowhere")
    assert (code, told["error"]["message"].count("there is no folder")) == (2, 1)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no result"), ('{"format": 99}', "is a result of format 99")]
)
def test_a_file_that_is_no_result_of_this_version_is_named(paper, tmp_path, text, message):
    file = tmp_path / "results" / "table9.lora.small" / "cola" / "seed-0.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    code, told = paper("list", "table9.lora")
    assert code == 2
    assert message in told["error"]["message"]


def test_a_run_that_another_cell_has_made_is_not_made_again(
    paper, finished, add_row, tmp_path, monkeypatch
):
    words = ("--tasks", "cola", "--seeds", "0")
    add_row("again", "", "")
    monkeypatch.setattr(run, "train", lambda *_, **__: pytest.fail("it is trained again"))
    assert states(paper("run", "table9.again", *words)[1]) == [("cola", 0, "done")]
    folder = tmp_path / "results" / "table9.again.small" / "cola"
    result = json.loads((folder / "seed-0.json").read_text())
    assert result["cell"] == "table9.again"
    assert result["same_run_as"] == "table9.lora.small/cola/seed-0.json"
    assert (folder / "seed-0.predictions.jsonl.gz").exists()


@pytest.mark.thorough
def test_runs_that_are_trained_together_have_a_result_each(paper, add_row, tmp_path):
    add_row("bitfit", "method: lora, lora: {rank: 2}", "method: bitfit")
    add_row("wider", "rank: 2", "rank: 3")
    words = ("table9", "--tasks", "cola", "--seeds", "0")
    assert {state for *_, state in states(paper("run", *words, "--joint", 3)[1])} == {"done"}
    together, counts = {}, {}
    for name in ("wider", "bitfit", "lora"):
        file = tmp_path / "results" / f"table9.{name}.small" / "cola" / "seed-0.json"
        result = json.loads(file.read_text())
        together[name] = result.get("together")
        counts[name] = result["parameters"]["without_head"]
        assert (result["steps"], result["scores"].keys()) == (4, {"best", "last"})
    assert together == {"wider": 2, "bitfit": None, "lora": 2}
    assert counts["wider"] * 2 == counts["lora"] * 3
    assert not list((tmp_path / "work").rglob("*.safetensors"))


@pytest.mark.thorough
def test_texts_are_answered_by_each_search_and_scored_again(paper, query_cell, data, tmp_path):
    code, told = paper("run", "table8.lora")
    assert (code, states(told)) == (0, [("wikisql", 0, "done")])
    file = tmp_path / "results" / "table8.lora.small" / "wikisql" / "seed-0.json"
    result = json.loads(file.read_text())
    assert result["scores"].keys() == {"last", "last, beam 2"}
    assert result["evaluations"] == []
    assert paper("verify", "table8", "--data", data) == (0, {"scored": 1, "differences": {}})
    rows = paper("table", "8")[1]["rows"]
    assert [row["search"] for row in rows] == ["", "beam 2"]
    assert all(row["state"] == "" for row in rows)


@pytest.mark.thorough
def test_a_task_can_start_from_the_adapter_of_another_s_run(
    paper, change_row, tmp_path, monkeypatch
):
    change_row("small: {}", "small: {tasks: {cola: {starts_from: sst2}, sst2: {}}}")
    begun = {}
    train = lk.train

    def note(config, **how):
        begun[config.data.train.partition("@")[0]] = config.init_from
        return train(config, **how)

    monkeypatch.setattr(run, "train", note)
    words = ("table9.lora", "--tasks", "cola,sst2", "--seeds", "0")
    assert states(paper("run", *words)[1]) == [("cola", 0, "done"), ("sst2", 0, "done")]
    start = begun["task:cola:train"]
    assert begun == {"task:sst2:train": None, "task:cola:train": start}
    assert lk.Adapter.load(start).card["data"]["train"].startswith("task:sst2:train")
    assert not list((tmp_path / "work").rglob("checkpoint-*"))


def test_a_dry_run_says_how_long_each_run_takes(paper, data, tiny_bert, monkeypatch):
    speed = durations.Speed(trained=2.0, read=4.0, written=1.0)
    monkeypatch.setattr(durations, "SPEEDS", {str(tiny_bert): speed})
    (one,) = paper("run", "table9.lora", "--tasks", "cola", "--seeds", "0", "--dry-run")[1]["runs"]
    lines = (data / "cola" / "train.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["sentence"]) / 4 for line in lines]
    training = 4 * 4 * sum(lengths) / len(lengths) / 2.0
    lines = (data / "cola" / "validation.jsonl").read_text().splitlines()[:16]
    # Two evaluations in training, and the best and the last adapter's.
    scoring = 4 * sum(len(json.loads(line)["sentence"]) / 4 for line in lines) / 4.0
    assert one["estimated_seconds"] == pytest.approx(training + scoring)
