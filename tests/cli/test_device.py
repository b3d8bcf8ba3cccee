"""The setting `device` of the verbs that load a base: each gives its word to what chooses."""

import dataclasses
import io

import pytest

import lorakit as lk
from lorakit.cli.main import main
from lorakit.config.serve import ServeConfig
from lorakit.models.device import device_for
from lorakit.models.load import load_model
from lorakit.serving.serve import prepared
from references import attach_random

VERBS = ("generate", "evaluate", "predict", "chat", "serve")


@pytest.fixture(scope="module")
def classifier(tiny_bert, tmp_path_factory):
    """The folder of a classifier's adapter."""
    model, _ = load_model(tiny_bert, task="classification", labels=("no", "yes"))
    attach_random(model, rank=2)
    card = {"task": "classification", "labels": ("no", "yes")}
    place = tmp_path_factory.mktemp("adapters") / "cats"
    return dataclasses.replace(lk.extract(model), card=card).save(place)


@pytest.fixture
def words(tiny_llama, prompt_rows, label_rows, classifier, monkeypatch):
    """What each verb is told beside the device."""
    monkeypatch.setattr("sys.stdin", io.StringIO("red cat\n"))
    model = ("--model", tiny_llama)
    rows = ("--data.validation", prompt_rows, "--data.validation-rows", 2, "--metrics", "loss")
    return {
        "generate": (*model, "--prompt", "red", "--max-new-tokens", 2),
        "evaluate": (*model, *rows),
        "predict": (classifier, "--input", label_rows),
        "chat": (*model, "--max-new-tokens", 2),
        "serve": (*model, "--port", 0),
    }


@pytest.fixture
def chosen(monkeypatch):
    """The words that were given to what chooses a device, which is the CPU."""
    asked = []

    def on_the_cpu(word):
        asked.append(word)
        return device_for("cpu")

    monkeypatch.setattr("lorakit.models.load.device_for", on_the_cpu)
    return asked


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("word", ["auto", "cpu"])
def test_a_verb_loads_its_base_where_it_is_told_to(verb, word, words, chosen, tiny_llama, capsys):
    told = () if word == "auto" else ("--device", word)
    if verb == "serve":
        engine, _ = prepared(
            ServeConfig(model=str(tiny_llama), **({"device": word} if told else {}))
        )
        assert engine.model.device.type == "cpu"
    else:
        assert main([verb, *map(str, (*words[verb], *told)), "--json"]) == 0
    assert chosen == [word]


@pytest.mark.parametrize("verb", VERBS)
def test_a_gpu_that_is_not_there_is_one_line_that_says_what_to_do(verb, words, monkeypatch, capsys):
    monkeypatch.setattr("lorakit.models.device.gpu_is_seen", lambda: False)
    assert main([verb, *map(str, words[verb]), "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "device is cuda, and torch" in error
    assert "give auto or cpu" in error


def test_a_loaded_model_stays_where_it_is(tiny_llama, chosen):
    model, tokenizer = load_model(tiny_llama)
    assert lk.generate("red", model=model, tokenizer=tokenizer, max_new_tokens=2)
    with pytest.raises(lk.errors.ConfigError, match="device is that of a base which is loaded by"):
        lk.generate("red", model=model, tokenizer=tokenizer, device="cpu")
    assert chosen == []
