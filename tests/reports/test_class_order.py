"""Classifiers as bases: their classes stay in the order of their head, and what is no class."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lorakit as lk
from lorakit.attachment.open_model import open_model
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.training.run import train
from tiny_models import build

WORDS = ("red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "bird", "fish")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A classifier whose classes are not in the order of the alphabet."""
    return _saved(tmp_path_factory.mktemp("classifier"), tiny_llama, {0: "pos", 1: "neg"})


def _saved(folder: Path, tokenizer: Path, names: dict[int, str]) -> Path:
    build("bert", num_labels=2, id2label=names).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Path:
    """Texts labelled by that classifier itself, as transformers reads it, but for two of them."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    found = []
    for first in WORDS:
        text = f"{first} cat"
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits
        found.append({"text": text, "label": model.config.id2label[int(logits.argmax())]})
    for row in found[:2]:
        row["label"] = {"pos": "neg", "neg": "pos"}[row["label"]]
    return _written(tmp_path_factory.mktemp("rows") / "rows.jsonl", found)


def _written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


RIGHT = pytest.approx(9 / 11)


def _settings(model: Path, rows: Path, out: Path, **more: Any) -> TrainConfig:
    data = {"train": str(rows), "validation": str(rows)} | more.pop("data", {})
    short = {"steps": 1, "learning_rate": 1e-9, "warmup_steps": 0, "allow_untrained": True}
    return TrainConfig(model=str(model), out=out, data=data, dtype="float32", **{**short, **more})


def test_a_classifier_is_scored_by_its_own_class_order(classifier: Path, rows: Path) -> None:
    data = DataConfig(validation=str(rows))
    assert lk.evaluate(model=str(classifier), data=data)["accuracy"] == RIGHT
    asked = {"data": data, "task": "classification"}
    assert lk.evaluate(model=str(classifier), **asked)["accuracy"] == RIGHT


def test_training_starts_on_the_head_as_it_is(classifier: Path, rows: Path, tmp_path: Path) -> None:
    found = train(_settings(classifier, rows, tmp_path / "out"))
    assert found.scores["accuracy"] == RIGHT
    adapter = lk.Adapter.load(tmp_path / "out")
    assert adapter.card["labels"] == ["pos", "neg"]
    data = DataConfig(validation=str(rows))
    assert lk.evaluate(adapter=adapter, data=data)["accuracy"] == RIGHT
    swapped = DataConfig(validation=str(rows), labels=("neg", "pos"))
    with pytest.raises(ConfigError, match=r"labels is neg, pos, but the classes of the adapter"):
        lk.evaluate(adapter=adapter, data=swapped)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("neg", "pos"), "in the order of its head, pos, neg: leave it out"),
        (("neg", "none", "pos"), "data.labels has 3 classes, and the classes of .* are"),
    ],
)
def test_labels_that_contradict_the_head_are_refused(
    classifier: Path, rows: Path, tmp_path: Path, labels: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(_settings(classifier, rows, tmp_path / "out", data={"labels": labels}))
    with pytest.raises(ConfigError, match=message):
        open_model(model=str(classifier), data=DataConfig(labels=labels))
    assert not (tmp_path / "out").exists()


def test_a_label_for_which_the_head_has_no_class_is_refused(
    classifier: Path, tmp_path: Path
) -> None:
    rows = _written(
        tmp_path / "r.jsonl", [{"text": "red", "label": "pos"}, {"text": "big", "label": "mixed"}]
    )
    message = "line 2: unknown label 'mixed'; the labels are pos, neg"
    with pytest.raises(DataError, match=message):
        train(_settings(classifier, rows, tmp_path / "out"))
    with pytest.raises(DataError, match=message):
        lk.evaluate(model=str(classifier), data=DataConfig(validation=str(rows)))


def test_classes_without_names_are_positions_or_get_names(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    base = _saved(tmp_path / "unnamed", tiny_llama, {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(DataError, match="name the head's classes, in this order, in data"):
        lk.evaluate(model=str(base), data=DataConfig(validation=str(rows)))
    named = DataConfig(validation=str(rows), labels=("pos", "neg"))
    assert lk.evaluate(model=str(base), data=named)["accuracy"] == RIGHT
    numbered = [json.loads(line) for line in rows.read_text().splitlines()]
    numbered = [row | {"label": ["pos", "neg"].index(row["label"])} for row in numbered]
    data = DataConfig(validation=str(_written(tmp_path / "n.jsonl", numbered)))
    assert lk.evaluate(model=str(base), data=data)["accuracy"] == RIGHT


def test_a_head_that_nobody_trained_is_not_scored(tiny_bert: Path, rows: Path) -> None:
    with pytest.raises(ModelError, match=r"has no head for classification \(classifier\)"):
        lk.evaluate(
            model=str(tiny_bert), task="classification", data=DataConfig(validation=str(rows))
        )


def test_a_classifier_writes_no_text(classifier: Path) -> None:
    with pytest.raises(ConfigError, match="this model does classification"):
        lk.generate("red", model=str(classifier))


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.thorough), 2])
def test_a_number_to_predict_may_be_the_one_that_marks_ignored_tokens(
    tiny_bert: Path, tmp_path: Path, accumulate: int
) -> None:
    labels = [-100, 3, -100, 5]
    rows = [{"text": word, "label": label} for word, label in zip(WORDS, labels, strict=False)]
    file = _written(tmp_path / "r.jsonl", rows)
    batches = {"accumulate": accumulate, "batch_size": 4 // accumulate}
    found = train(_settings(tiny_bert, file, tmp_path / "out", task="regression", **batches))
    assert found.first_loss == pytest.approx(found.scores["loss"], rel=0.01)
    assert found.first_loss == pytest.approx(sum(label**2 for label in labels) / 4, rel=0.05)
