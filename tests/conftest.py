"""Small real things for tests: a tiny model with a tokenizer, saved as a folder."""

import json
import os
import random

import pytest

# Set before transformers is imported; nothing that is tested may need a network.
os.environ["HF_HUB_OFFLINE"] = "1"

WORDS = ("red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "bird", "fish")


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "yes", "no", "\n"])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


def _save(folder, family):
    from tiny_models import build

    model = build(family)
    # An encoder without the classifier of its family's recipe, as pre-trained ones come.
    (model.bert if family == "bert" else model).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Return the folder of a tiny causal language model."""
    return _save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Return the folder of a tiny encoder."""
    return _save(tmp_path_factory.mktemp("models") / "tiny-bert", "bert")


@pytest.fixture(scope="session")
def prompt_rows(tmp_path_factory):
    """Return a file of rows: three words, and the same words backwards."""
    return _write(tmp_path_factory, "prompts", lambda w: {"prompt": w, "completion": _back(w)})


@pytest.fixture(scope="session")
def label_rows(tmp_path_factory):
    """Return a file of texts with a class: whether there is a cat."""
    return _write(
        tmp_path_factory, "labels", lambda w: {"text": w, "label": "yes" if "cat" in w else "no"}
    )


def _back(words):
    return " ".join(reversed(words.split()))


def _write(factory, name, row):
    draw = random.Random(0)
    file = factory.mktemp("rows") / f"{name}.jsonl"
    lines = (json.dumps(row(" ".join(draw.choices(WORDS, k=3)))) for _ in range(64))
    file.write_text("\n".join(lines))
    return file
