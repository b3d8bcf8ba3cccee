"""A tiny model whose tokens are words, and adapters for it."""

import pytest

from serving.engines import KINDS, word_tokenizer
from tiny_models import build


@pytest.fixture(scope="session")
def words(tiny_llama, tmp_path_factory):
    """A tiny model, each token of which is a word."""
    place = tmp_path_factory.mktemp("models") / "words"
    tokenizer = word_tokenizer(tiny_llama)
    build("llama", vocab_size=len(tokenizer)).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def folder(words, tmp_path_factory):
    pytest.importorskip("fastapi")
    from serving.servers import save

    root = tmp_path_factory.mktemp("served")
    for seed, name in enumerate(("small", "wide")):
        save(words, root / name, seed, **KINDS[name])
    return root


@pytest.fixture(scope="module")
def server(words, folder):
    from serving.servers import Server

    made = Server(words, folder)
    yield made
    made.engine.close(drain=False)
