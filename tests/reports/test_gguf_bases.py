"""GGUF files and folders of them as a base."""

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.attachment.open_model import open_model
from lorakit.errors import ModelError
from lorakit.models import gguf_file
from lorakit.models.load import load_model, model_name
from tiny_gguf import write_gguf
from tiny_models import build, example_inputs


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    made = tmp_path / "model" / "Tiny.F32.gguf"
    # transformers 5.17 splits words as GPT-2's tokenizer does, whatever the file says.
    split = "qwen2" if "qwen2" in gguf_file.known_splits() else "gpt-2"
    write_gguf(made, build("llama", tie_word_embeddings=True), split=split)
    return made


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_is_a_base(file: Path, as_folder: bool) -> None:
    path = file.parent if as_folder else file
    model, tokenizer = load_model(path)
    source = build("llama", tie_word_embeddings=True)
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert model(**example_inputs(model)).logits.isfinite().all()
    assert tokenizer.tokenize("a12") == ["a", "1", "2"]
    assert model_name(model) == str(path)


def test_it_is_converted_once_and_read_again_by_the_adapter_s_record(
    file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(file)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q",)))
    folder = lk.extract(model).save(tmp_path / "adapter")
    monkeypatch.setattr(gguf_file, "_read_gguf", lambda *_: pytest.fail("converted again"))
    opened = open_model(folder)
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(
        opened.model(**example_inputs(model)).logits, model(**example_inputs(model)).logits
    )


def test_a_gguf_file_is_a_classifier_s_backbone(file: Path) -> None:
    model, _ = load_model(file, task="classification", labels=("no", "yes"))
    assert model(**example_inputs(model)).logits.shape == (2, 2)


def test_a_folder_with_several_files_is_asked_for_one(file: Path) -> None:
    other = file.with_name("Tiny.Q8.gguf")
    other.write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: name one of Tiny\.F32\.gguf"):
        load_model(file.parent)
    load_model(other)


def test_a_folder_of_transformers_with_a_gguf_file_beside_is_the_folder(file: Path) -> None:
    build("llama", seed=3).save_pretrained(file.parent)
    load_model(file)[1].save_pretrained(file.parent)
    model, _ = load_model(file.parent)
    assert torch.equal(model.lm_head.weight, build("llama", seed=3).lm_head.weight)


def test_parts_of_a_split_model_are_refused(file: Path) -> None:
    parts = [file.with_name(f"Tiny-0000{number}-of-00002.gguf") for number in (1, 2)]
    for part in parts:
        part.write_bytes(file.read_bytes())
    file.unlink()
    for path in (parts[0], file.parent):
        with pytest.raises(ModelError, match="one part of a model that was split"):
            load_model(path)


def test_words_that_transformers_would_split_otherwise_are_refused(file: Path, cache: Path) -> None:
    write_gguf(file, build("llama", tie_word_embeddings=True), split="unheard-of")
    with pytest.raises(ModelError, match="divides texts into words as 'unheard-of'"):
        load_model(file)
    assert not cache.exists()


@pytest.mark.parametrize("kind", ["unheard-of", "mpt"])
def test_an_architecture_that_transformers_does_not_read_is_named(file: Path, kind: str) -> None:
    write_gguf(file, build("llama", tie_word_embeddings=True), kind=kind)
    with pytest.raises(ModelError, match=f"cannot be read as a GGUF file: .*{kind}"):
        load_model(file)


def test_what_is_only_called_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("text")
    with pytest.raises(ModelError, match="cannot be read as a GGUF file"):
        load_model(tmp_path / "a.gguf")
