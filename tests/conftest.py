"""Small real things for tests: a tiny model with a tokenizer, saved as a folder."""

import gc
import importlib
import json
import os
import random
import shutil
from pathlib import Path

import hypothesis
import pytest

from shape_checks import spare_shapeless_functions

# Set before transformers is imported; nothing that is tested may need a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Before lorakit is imported, by whichever test.
spare_shapeless_functions()

# By default an example that takes more than 0.2 s fails, and so do examples that are slow to draw:
# on a machine that does other work too, any may be.
hypothesis.settings.register_profile(
    "no-clock", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("no-clock")

# Modules, tests and their cases stay to the end: looking for garbage among them takes half a
# second, and libraries ask for that at every training run.
gc.disable()

# Temporary folders in memory, where there is enough of it: pytest's own variable.
MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 2 << 30
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection(session):
    """Import what lorakit imports of others before lorakit, in processes that collect tests.

    While a module of lorakit is imported, jaxtyping's hook, which has shapes checked, looks for
    bytecode of another name than usual, also for what that module imports: without this, hundreds
    of modules of torch, PEFT and others would be compiled from source first, for 20 seconds.
    """
    config = session.config
    collects = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if collects and (config.getoption("jaxtyping_packages", None) or "").startswith("lorakit"):
        importlib.import_module("transformers.trainer")


def pytest_collection_finish(session):
    """Have garbage looked for again, among what comes from now on."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure(config):
    """Have what was imported taken down at the end; nanobind prints what is not."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """What runs programs in processes of their own, without the checks of shapes."""
    from forks import Forks

    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


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
    """The folder of a tiny causal language model."""
    return _save(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The folder of a tiny encoder."""
    return _save(tmp_path_factory.mktemp("models") / "tiny-bert", "bert")


@pytest.fixture(scope="session")
def prompt_rows(tmp_path_factory):
    """A file of rows: three words, and the same words backwards."""
    return _write(tmp_path_factory, "prompts", lambda w: {"prompt": w, "completion": _back(w)})


@pytest.fixture(scope="session")
def label_rows(tmp_path_factory):
    """A file of texts with a class: whether there is a cat."""
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
