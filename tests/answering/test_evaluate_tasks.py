"""Evaluation on rows of the paper's tasks: by the task's scorer, and again from the outputs."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from lorakit.errors import ConfigError, DataError, MissingExtraError


def source(folder: Path, task: str, rows: list[dict[str, Any]], split: str = "test") -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text)
    return f"task:{task}:{split}@{folder}"


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(word) for word in (*words, "--json")]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


CHATS = [
    {"dialogue": "red: big cat\nbig: red dog", "summary": "red big cat dog"},
    {"dialogue": "dog: red fish", "summary": "red fish"},
]


@pytest.mark.thorough
def test_summaries_are_scored_by_rouge_and_again_from_the_file_of_outputs(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = source(tmp_path, "samsum", CHATS), tmp_path / "outputs.jsonl"
    words = ["evaluate", "--model", tiny_llama, "--data.validation", rows]
    words += ["--max-new-tokens", 6]
    found = run(capsys, *words, "--outputs", out)
    names = ["rouge1", "rouge2", "rouge_l", "rouge_lsum"]
    assert list(found)[-6:] == ["loss", "perplexity", *names]
    assert found["scorers"] == dict.fromkeys(
        names, "rouge-score 0.1.2, stemmed (lorakit's scorer, version 1)"
    )
    again = run(capsys, "score", out, "--task", "samsum")
    assert [again[name] for name in names] == [found[name] for name in names]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["references"] for record in records] == [[row["summary"]] for row in CHATS]
    assert main([str(word) for word in words]) == 0
    assert "\nrouge-score 0.1.2, stemmed (lorakit's scorer, version 1):\nrouge1 " in (
        capsys.readouterr().out
    )


def test_an_answer_is_read_as_a_query_and_an_unreadable_one_is_wrong(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"header": ["year", "score"], "types": ["real", "text"], "rows": [[1, "a"], [2, "b"]]}
    query = {"sel": 1, "agg": 0, "conds": [[0, 1, "1"]]}
    row = {"question": "Which score after year 1?", "table": table, "sql": query}
    rows, out = source(tmp_path, "wikisql", [row] * 3), tmp_path / "outputs.jsonl"
    answers = ["SELECT score FROM table WHERE year = '2'", "no query", "SELECT score FROM table"]
    right = "SELECT score FROM table WHERE year > '1'"
    data = lk.DataConfig(validation=rows, validation_rows=9)
    for first, form in ((right, 1 / 3), (answers[0], 0)):
        written = [first, *answers[1:]]
        monkeypatch.setattr("lorakit.answering.evaluate.answer", lambda *_, w=written, **__: w)
        scores = lk.evaluate(model=str(tiny_llama), data=data, metrics=["task"], outputs=out)
        assert scores == {"logical_form": pytest.approx(form), "execution": pytest.approx(1 / 3)}
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [record["output"] is None for record in records] == [False, True, False]
        assert records[0]["references"] == query
        again = [record["output"] for record in records], [query] * 3
        assert lk.score("wikisql", *again) == {"logical_form": pytest.approx(form)}
        out.unlink()


def test_classes_are_scored_by_name_in_whatever_order_the_head_has_them(
    tiny_bert: Path, tmp_path: Path
) -> None:
    labels = [0, 1, 1, 0, 1, 1, 1, 0]
    texts = [{"sentence": f"{'red ' * n} cat", "label": label} for n, label in enumerate(labels)]
    data = lk.DataConfig(
        validation=source(tmp_path, "cola", texts, "validation"), validation_rows=9
    )
    torch.manual_seed(1)
    model, tokenizer = lk.load_model(
        tiny_bert, task="classification", labels=("acceptable", "unacceptable")
    )
    out = tmp_path / "outputs.jsonl"
    scores = lk.evaluate(model=model, tokenizer=tokenizer, data=data, outputs=out, batch_size=3)
    assert list(scores) == ["loss", "accuracy", "matthews"]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["unacceptable", "acceptable"]
    assert [record["references"] for record in records] == [names[label] for label in labels]
    with torch.no_grad():
        inputs = tokenizer(
            [str(row["sentence"]) for row in texts], padding=True, return_tensors="pt"
        )
        best = model(**inputs).logits.argmax(-1).tolist()
    assert [record["answer"] for record in records] == [names[1 - number] for number in best]
    right = sum(number != label for number, label in zip(best, labels, strict=True))
    assert scores["accuracy"] == right / len(labels)
    other, _ = lk.load_model(tiny_bert, task="classification", labels=("no", "yes"))
    with pytest.raises(DataError, match="has the classes unacceptable, acceptable, and the model"):
        lk.evaluate(model=other, tokenizer=tokenizer, data=data)


def test_correlations_of_one_value_are_not_defined_and_that_is_said(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = [{"sentence1": "red", "sentence2": "cat", "label": number} for number in (1.0, 4.5)]
    data = lk.DataConfig(validation=source(tmp_path, "stsb", rows), validation_rows=9)
    model, tokenizer = lk.load_model(tiny_bert, task="regression")
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.warns(UserWarning, match="pearson and spearman: not defined where all values are"):
        scores = lk.evaluate(model=model, tokenizer=tokenizer, data=data)
    assert list(scores) == ["loss", "pearson", "spearman"]
    with pytest.raises(ConfigError, match="bleu: of texts that a model writes, and regression has"):
        lk.evaluate(model=model, tokenizer=tokenizer, data=data, metrics="bleu")


def test_the_correlation_of_one_row_is_not_defined_and_that_is_said(
    tiny_bert: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "red cat", "label": 2.5}))
    model, tokenizer = lk.load_model(tiny_bert, task="regression")
    data = lk.DataConfig(validation=str(file))
    with pytest.warns(UserWarning, match="pearson: not defined where all values are equal"):
        scores = lk.evaluate(model=model, tokenizer=tokenizer, data=data)
    assert scores["loss"] > 0
    assert math.isnan(scores["pearson"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": "task"}, "task: of the official scorer of a task, and data.validation is row"),
        ({"variant": "perl"}, "variant: of the official scorer of a task"),
        ({"metrics": "rouge"}, r"\['rouge'\] unknown; there are loss, exact_match, bleu, task"),
        ({"metrics": "loss", "num_beams": 4}, "num_beams: of answers, and none are generated here"),
    ],
)
def test_metrics_that_rows_do_not_have_are_refused(
    settings: dict[str, Any], message: str, tiny_llama: Path, prompt_rows: Path
) -> None:
    name = "rows.jsonl" if "num_beams" not in settings else str(prompt_rows)
    with pytest.raises(ConfigError, match=message):
        lk.evaluate(model=str(tiny_llama), data=lk.DataConfig(validation=name), **settings)


def test_a_task_s_scores_are_checked_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(task: str, **settings: Any) -> None:
        data = lk.DataConfig(validation=f"task:{task}@nowhere")
        lk.evaluate(model="no/model", data=data, **settings)

    with pytest.raises(ConfigError, match="bleu is among the scores of the task e2e too"):
        asked("e2e", metrics=["bleu", "task"])
    with pytest.raises(ConfigError, match="the scorer of e2e has python and perl, not 'paper'"):
        asked("e2e", variant="paper")
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(MissingExtraError, match=r"the scorer of samsum .*lorakit\[metrics\]"):
        asked("samsum")
    path = Path("nowhere")
    monkeypatch.setattr("lorakit.data.metrics.meteor.tables.packaged", lambda name: path / name)
    with pytest.raises(DataError, match="METEOR needs pycocoevalcap/meteor/meteor"):
        asked("dart")


def test_a_file_of_outputs_without_references_is_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").write_text('{"answer": "a", "references": ["a"]}\n{"answer": "b"}\n')
    assert main(["score", str(tmp_path / "o"), "--task", "samsum"]) == 2
    assert "line 2 has no answer with its references" in capsys.readouterr().err
