"""Predictions: each row has what its own adapter says alone, whatever else is in the batch."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import lorakit as lk
from lorakit.answering.predict import predictions
from lorakit.config.answering import PredictConfig
from lorakit.errors import AdapterFileError, ConfigError, DataError
from lorakit.models.load import load_model
from references import attach_random

LABELS = {
    "cats": ("classification", ("no", "yes")),
    "sizes": ("classification", ("big", "old", "small")),
    "colours": ("multi-label", ("blue", "green", "red", "none")),
    "ages": ("regression", None),
}
TEXTS = ["red cat", "big old dog", "fish", "new bird green", "small", "old old old fish"]


def save(folder, base, name, task, labels, seed, **card):
    torch.manual_seed(seed)
    model, _ = load_model(base, task=task, labels=labels)
    attach_random(model, seed=seed, std=0.3, rank=2 + seed, targets=("all-linear",))
    what = {"task": task, "labels": labels, **card}
    replace(lk.extract(model), card=what).save(folder / name)


@pytest.fixture(scope="module")
def adapters(tiny_bert, tmp_path_factory):
    root = tmp_path_factory.mktemp("heads")
    for seed, (name, (task, labels)) in enumerate(LABELS.items()):
        fields = {"data": {"fields": {"text": "said", "label": "stars"}}} if name == "sizes" else {}
        save(root, tiny_bert, name, task, labels, seed, **fields)
    save(root, tiny_bert, "tags", "token-classification", ("B", "O"), 5)
    save(root, tiny_bert, "spans", "question-answering", None, 6)
    save(root, tiny_bert, "near", "embedding", None, 7)
    return root


def rows_of(folder, *rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def alone(base, folder, name, text):
    """The logits of a text with an adapter on a model of its own."""
    task, labels = LABELS[name]
    model, tokenizer = load_model(base, task=task, labels=labels)
    lk.attach(model, folder / name)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def asked(*names, root, **settings):
    return predictions(PredictConfig(adapters=[str(root / name) for name in names], **settings))


def test_rows_with_heads_of_other_widths_and_tasks_are_in_one_batch(tiny_bert, adapters, tmp_path):
    # `sizes` was trained with columns of other names.
    rows = [{"text": text, "said": text} for text in TEXTS]
    found = asked(*LABELS, root=adapters, input=rows_of(tmp_path, *rows), batch_size=5)
    assert [(each.row, each.adapter) for each in found] == [
        (row, name) for row in range(len(TEXTS)) for name in LABELS
    ]
    for each in found:
        logits = alone(tiny_bert, adapters, each.adapter, TEXTS[each.row])
        task, labels = LABELS[each.adapter]
        assert each.columns == rows[each.row]
        if task == "regression":
            assert each.answer == pytest.approx(float(logits[0]), abs=1e-5)
            assert each.probabilities is None
            continue
        shares = logits.softmax(-1) if task == "classification" else logits.sigmoid()
        assert list(each.probabilities) == list(labels)
        assert list(each.probabilities.values()) == pytest.approx(shares.tolist(), abs=1e-5)
        likely = [name for name, share in zip(labels, shares, strict=True) if share > 0.5]
        answer = labels[int(shares.argmax())] if task == "classification" else likely
        assert each.answer == answer


def test_a_row_is_answered_by_the_adapter_that_it_names_and_its_label_is_not_read(
    adapters, tmp_path
):
    rows = [
        {"text": "red cat", "adapter": "cats", "label": ["nonsense"]},
        {"text": "fish", "adapter": None, "label": -1},
        {"text": "fish", "adapter": "ages"},
    ]
    found = asked("cats", "ages", root=adapters, input=rows_of(tmp_path, *rows))
    assert [(each.row, each.adapter) for each in found] == [
        (0, "cats"),
        (1, "cats"),
        (1, "ages"),
        (2, "ages"),
    ]
    again = asked("cats", root=adapters, input=rows_of(tmp_path, {"text": "red cat"}))
    assert again[0].probabilities == pytest.approx(found[0].probabilities, abs=1e-6)


def test_words_have_tags_questions_spans_and_pairs_cosines(tiny_bert, adapters, tmp_path):
    words = rows_of(tmp_path, {"tokens": ["red", "cat", "big"], "ner_tags": [7, 7, 7]})
    (tags,) = asked("tags", root=adapters, input=words)
    assert len(tags.answer) == 3
    assert set(tags.answer) <= {"B", "O"}
    context = "a red cat and a big dog"
    question = rows_of(tmp_path, {"question": "red", "context": context, "answers": []})
    (span,) = asked("spans", root=adapters, input=question)
    assert span.answer
    assert span.answer in context
    pairs = rows_of(tmp_path, *({"text": "red", "text_pair": text} for text in ("cat", "red")))
    found = asked("near", root=adapters, input=pairs)
    assert found[1].answer == pytest.approx(1, abs=1e-5)
    assert found[0].answer < 0.999


@pytest.mark.thorough
def test_a_question_has_no_answer_where_some_that_were_trained_on_had_none(tiny_bert, tmp_path):
    context = {"context": "a red cat and a big dog"}
    unanswered: list[dict[str, Any]] = [
        {"question": each, **context, "answers": []} for each in ("fish", "bird")
    ]
    answered = {"question": "red", **context, "answers": ["cat"]}
    how: dict[str, Any] = {"model": str(tiny_bert), "dtype": "float32"}
    how |= {"task": "question-answering"}
    how |= {"steps": 30, "batch_size": 3, "learning_rate": 0.03, "warmup_steps": 1}
    how |= {"lora": {"targets": ["all-linear"]}}
    for name, rows in (("some", [*unanswered, answered]), ("none", [answered] * 3)):
        data = {"train": rows_of(tmp_path, *rows)}
        lk.train(lk.TrainConfig(out=tmp_path / name, data=data, **how))
    assert lk.Adapter.load(tmp_path / "some").card["may_answer_nothing"] is True
    assert "may_answer_nothing" not in lk.Adapter.load(tmp_path / "none").card
    asks = rows_of(tmp_path, *({"question": each, **context} for each in ("fish", "red", "bird")))

    def said(name, **settings):
        return [each.answer for each in asked(name, root=tmp_path, input=asks, **settings)]

    assert said("some") == ["", "cat", ""]
    assert all(said("some", may_answer_nothing=False))
    assert all(said("none"))
    held_out = rows_of(tmp_path, *unanswered, answered)
    scores = lk.evaluate(adapter=tmp_path / "some", data={"validation": held_out})
    assert scores["f1"] == scores["exact_match"] == 1


def test_a_base_with_a_head_of_its_own_needs_no_adapter(tiny_bert, tmp_path):
    torch.manual_seed(1)
    model, tokenizer = load_model(tiny_bert, task="classification", labels=("no", "yes"))
    place = tmp_path / "whole"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    rows = rows_of(tmp_path, *({"text": text} for text in TEXTS))
    found = asked(root=tmp_path, model=str(place), input=rows)
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS[1], return_tensors="pt")).logits[0]
    assert list(found[1].probabilities.values()) == pytest.approx(logits.softmax(-1).tolist())
    assert "adapter" not in found[1].record


def test_what_cannot_be_predicted_says_why(tiny_bert, tiny_llama, adapters, tmp_path):
    rows = rows_of(tmp_path, {"text": "red", "adapter": "cat"}, {"text": " "})
    with pytest.raises(DataError, match="line 1: adapter is 'cat'; there are cats"):
        asked("cats", root=adapters, input=rows)
    with pytest.raises(
        DataError, match=r"no column 'text'; did you mean 'txt'\?\nIts columns are txt\."
    ):
        asked("cats", root=adapters, input=rows_of(tmp_path, {"txt": "red"}))
    with pytest.raises(ConfigError, match="forms: ask them one after the other") as error:
        asked("cats", "tags", root=adapters, input=rows)
    assert "tags: token-classification" in str(error.value)
    with pytest.raises(ConfigError, match="two adapters are called cats"):
        asked("cats", "cats", root=adapters, input=rows)
    with pytest.raises(ConfigError, match="rows to answer are named by input"):
        asked("cats", root=adapters, input=rows, data={"validation": rows})
    with pytest.raises(DataError, match="line 1: text is empty"):
        asked("cats", root=adapters, input=rows_of(tmp_path, {"text": " "}))
    with pytest.raises(ConfigError, match=r"has no trained head that gives.*`lorakit generate`"):
        asked(root=adapters, model=str(tiny_llama), input=rows)
    with pytest.raises(ConfigError, match="does not say what its classes are called"):
        asked(root=adapters, model=str(tiny_bert), task="classification", input=rows)
    with pytest.raises(ConfigError, match="give adapters, a model, or both"):
        asked(root=adapters, input=rows)
    good = rows_of(tmp_path, {"text": "red"})
    other = tmp_path / "other"
    model, tokenizer = load_model(tiny_bert, task="classification", labels=("no", "yes"))
    model.bert.embeddings.word_embeddings.weight.data.add_(1)
    model.bert.save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(AdapterFileError, match="cannot be asked on") as error:
        asked("cats", "ages", root=adapters, model=str(other), input=good)
    assert "ages: the adapter does not fit this model" in str(error.value)
