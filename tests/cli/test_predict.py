"""Several heads on one base by the command line: train, evaluate, predict, serve."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.cli.main import main
from lorakit.models.load import load_model
from references import in_both

POLARITY = {
    "positive": ("a warm and funny film", "truly moving", "the cast is superb"),
    "negative": ("a dull and lifeless film", "truly boring", "the cast is wasted"),
}
TOPICS = {
    "food": ("the soup needs more salt", "bake the bread for an hour"),
    "money": ("the bank raised its rates", "shares fell on monday"),
    "sport": ("the match ended in a draw", "the team signed a new keeper"),
}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def labelled(texts_of, text, label):
    return [{text: each, label: name} for name, texts in texts_of.items() for each in texts] * 4


@pytest.mark.thorough
def test_two_classifiers_of_one_base_answer_rows_of_one_batch(tmp_path, run, capsys):
    polarity = write(tmp_path / "polarity.jsonl", labelled(POLARITY, "text", "label"))
    topics = write(tmp_path / "topics.jsonl", labelled(TOPICS, "headline", "topic"))
    common = ["--model", "minilm", "--lora.targets", "attention,mlp", "--dtype", "float32"]
    common += ["--warmup-steps", "2", "--learning-rate", "3e-3"]
    out = tmp_path / "out"
    fields = ["--data.fields", "{text: headline, label: topic}"]
    for rows, name, more in ((polarity, "polarity", []), (topics, "topic", fields)):
        words = ["train", *common, "--data.train", rows, *more, "--out", out / name]
        assert run(*words, "--steps", 25)[0] == 0
        _, scores = run("evaluate", out / name, "--data.validation", rows, *more)
        assert scores["accuracy"] > 0.9

    both = write(
        tmp_path / "both.jsonl",
        [
            {"id": 7, "text": "truly moving", "headline": "the bank raised its rates"},
            {"id": 8, "text": "the cast is wasted", "headline": "bake the bread for an hour"},
        ],
    )
    code, result = run("predict", out / "polarity", out / "topic", "--input", both)
    assert code == 0
    found = [(each["id"], each["adapter"], each["answer"]) for each in result["answers"]]
    assert found == [
        (7, "polarity", "positive"),
        (7, "topic", "money"),
        (8, "polarity", "negative"),
        (8, "topic", "food"),
    ]
    assert [len(each["probabilities"]) for each in result["answers"]] == [2, 3, 2, 3]

    named = write(tmp_path / "named.jsonl", [{"text": "truly boring", "adapter": "polarity"}])
    answers = tmp_path / "answers.jsonl"
    words = ["predict", out / "polarity", out / "topic", "--input", named, "--outputs", answers]
    assert main(list(map(str, words))) == 0
    assert f"1 answers in {answers}" in capsys.readouterr().out
    (line,) = answers.read_text().splitlines()
    assert json.loads(line)["answer"] == "negative"
    assert lk.predict(out / "polarity", input=str(named)) == [json.loads(line)]
    assert run(*words)[0] == 2

    for part in served(out):
        assert part


def served(folder):
    """Whether a server of the same folder says the same, adapter by adapter."""
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from lorakit.config.serve import ServeConfig
    from lorakit.serving.api.app import build_app
    from lorakit.serving.api.own_engine import OwnEngine
    from lorakit.serving.serve import prepared

    engine, catalog = prepared(ServeConfig(adapters=folder, model="minilm"))
    engine.start()
    client = TestClient(build_app(OwnEngine(engine, catalog)))
    for name, text, label in (
        ("polarity", "truly moving", "positive"),
        ("topic", "shares fell on monday", "money"),
    ):
        body = {"model": name, "input": text}
        data = client.post("/v1/classify", json=body).json()["data"]
        yield data[0]["label"] == label
        yield client.post("/v1/embeddings", json=body).status_code == 400
    engine.close()


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_fresh_head_of_another_width_is_used_by_every_verb(tiny_bert, tmp_path, run, label_rows):
    torch.manual_seed(1)
    model, tokenizer = load_model(tiny_bert, task="classification", labels=("big", "old", "small"))
    base, out = tmp_path / "three", tmp_path / "out"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    words = ["train", "--model", base, "--data.train", label_rows, "--out", out]
    words += ["--steps", 6, "--dtype", "float32", "--lora.targets", "q", "--warmup-steps", 1]
    code, result = run(*words)
    assert code == 2
    assert "the labels are big, old, small" in result["error"]["message"]
    hint = "For other classes than those of the checkpoint's head set fresh_head: true."
    assert result["error"]["message"].endswith(hint)
    code, result = run(*words, "--data.labels", "no,yes")
    assert code == 2
    assert result["error"]["message"].endswith(hint)
    code, result = run(*words, "--fresh-head")
    assert code == 0
    # Its two classes are PEFT's too, on the base with a head of their number.
    torch.testing.assert_close(*in_both(out, {"input_ids": torch.tensor([[5, 11, 6, 12]])}))
    code, scores = run("evaluate", out, "--data.validation", label_rows)
    assert code == 0
    assert 0 <= scores["accuracy"] <= 1
    rows = write(tmp_path / "rows.jsonl", [{"text": "red cat"}])
    code, result = run("predict", out, "--input", rows)
    assert code == 0
    (answer,) = result["answers"]
    assert set(answer["probabilities"]) == {"no", "yes"}
    # Beside it the base's own head still answers.
    code, result = run("predict", "--model", base, "--input", rows)
    assert code == 0
    assert set(result["answers"][0]["probabilities"]) == {"big", "old", "small"}
    code, _ = run("merge", out, "--out", tmp_path / "merged")
    assert code == 0
    code, result = run("predict", "--model", tmp_path / "merged", "--input", rows)
    assert code == 0
    merged = result["answers"][0]["probabilities"]
    assert merged == pytest.approx(answer["probabilities"], abs=1e-5)
