"""lk.evaluate: a dictionary of scores, by name or on a loaded model."""

import sys

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError, MissingExtraError
from references import attach_random


def test_scores_are_the_same_by_folder_and_on_a_loaded_model(tiny_llama, prompt_rows, tmp_path):
    model, tokenizer = lk.load_model(tiny_llama)
    attach_random(model, targets=("all-linear",))
    adapter = lk.extract(model)
    lk.detach(model)
    folder = adapter.save(tmp_path / "adapter")
    data = lk.DataConfig(validation=str(prompt_rows), validation_rows=16)
    rows = {"data": data, "max_new_tokens": 4}
    by_name = lk.evaluate(adapter=folder, **rows)
    loaded = lk.evaluate(adapter=adapter, model=model, tokenizer=tokenizer, **rows)
    assert by_name.keys() == {"loss", "perplexity", "exact_match", "bleu"}
    assert loaded == by_name
    base = lk.evaluate(model=model, tokenizer=tokenizer, metrics="loss", **rows)
    assert base.keys() == {"loss", "perplexity"}
    assert base["loss"] != by_name["loss"]
    assert not hasattr(model, "_lorakit")


def test_every_nth_row_is_scored(tiny_llama, prompt_rows, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(prompt_rows.read_text().splitlines()[:7:3]))
    asked = {"model": str(tiny_llama), "metrics": "loss"}
    thinned = lk.DataConfig(validation=str(prompt_rows), validation_rows=7, validation_every=3)
    alone = lk.evaluate(data=lk.DataConfig(validation=str(few)), **asked)
    assert lk.evaluate(data=thinned, **asked) == alone


def test_bleu_is_left_out_of_the_usual_scores_where_its_library_is_not_installed(
    tiny_llama, prompt_rows, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    rows = {"data": lk.DataConfig(validation=str(prompt_rows), validation_rows=2)}
    with pytest.warns(UserWarning, match=r"left out: BLEU needs .*lorakit\[metrics\]"):
        scores = lk.evaluate(model=str(tiny_llama), max_new_tokens=4, **rows)
    assert scores.keys() == {"loss", "perplexity", "exact_match"}
    with pytest.raises(MissingExtraError, match="BLEU needs an optional library"):
        lk.evaluate(model=str(tiny_llama), metrics="bleu", **rows)


def test_a_loaded_classifier_is_scored_by_its_own_classes(tiny_bert, label_rows):
    torch.manual_seed(0)
    model, tokenizer = lk.load_model(tiny_bert, task="classification", labels=("no", "yes"))
    data = lk.DataConfig(validation=str(label_rows))
    scores = lk.evaluate(model=model, tokenizer=tokenizer, data=data)
    assert scores.keys() == {"loss", "accuracy"}
    with pytest.raises(ConfigError, match="the task is generation, and the loaded model does clas"):
        lk.evaluate(model=model, tokenizer=tokenizer, data=data, task="generation")
