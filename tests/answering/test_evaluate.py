"""lk.evaluate: a dictionary of scores, by name or on a loaded model."""

import pytest
import torch

import lorakit as lk
from lorakit.errors import ConfigError
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


def test_a_loaded_classifier_is_scored_by_its_own_classes(tiny_bert, label_rows):
    torch.manual_seed(0)
    model, tokenizer = lk.load_model(tiny_bert, task="classification", labels=("no", "yes"))
    data = lk.DataConfig(validation=str(label_rows))
    scores = lk.evaluate(model=model, tokenizer=tokenizer, data=data)
    assert scores.keys() == {"loss", "accuracy"}
    with pytest.raises(ConfigError, match="the task is generation, and the loaded model does clas"):
        lk.evaluate(model=model, tokenizer=tokenizer, data=data, task="generation")
