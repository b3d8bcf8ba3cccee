"""Folders from strangers: they run no code, do not hang, and do not fill memory or disk."""

import json
import logging
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorakit as lk
from lorakit.analysis.report import AdapterFindings, adapter_page, log_of
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data import template_limits
from lorakit.data.chat import ChatTemplate
from lorakit.data.problems import UnusableRowError
from lorakit.data.row_types import Message, MessagesRow
from lorakit.errors import AdapterFileError, ConfigError, DataError, ModelError
from lorakit.models import paths
from lorakit.models.load import load_model, own_classes, own_task
from lorakit.serving.catalog import Catalog
from lorakit.serving.prompts import chat_ids
from lorakit.training.run import train
from tiny_models import build
from tiny_tokenizers import build_tokenizer

SLOW = "(.|.)*[A-Z]"
"""A pattern that takes for ever to say no to a path."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in PEFT's two files."""
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q",)))
    made = lk.extract(model).save(tmp_path / "adapter")
    (made / "lorakit.json").unlink()
    return made


def edit(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


# Sizes.


def test_a_weights_file_that_claims_more_than_it_has_is_refused_unread(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(AdapterFileError, match=r"claims 4,398,046,\d{3},\d{3} bytes and has \d+"):
        lk.Adapter.load(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_far_larger_than_what_is_in_it_is_never_read(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)  # a hole: no disk is used
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("was read"))
    with pytest.raises(AdapterFileError, match="bytes"):
        lk.Adapter.load(folder)


def as_pickle(folder: Path, content: object) -> Path:
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    torch.save(content, folder / "adapter_model.bin")
    return folder / "adapter_model.bin"


def test_a_pickle_that_grows_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    file = as_pickle(folder, tensors | {"zeros": torch.zeros(2**20)})
    with zipfile.ZipFile(file) as archive:
        content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(AdapterFileError, match="it would grow from"):
        lk.Adapter.load(folder)


def test_a_tensor_that_repeats_one_value_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    as_pickle(folder, tensors | {"wide": torch.zeros(1).expand(2**40)})
    with pytest.raises(AdapterFileError, match="wide has a larger shape than values in the file"):
        lk.Adapter.load(folder)


# Time.


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_pattern_that_takes_for_ever_stops(
    folder: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "SLOWEST_MATCH_S", 0.05)
    adapter = lk.Adapter.load(edit(folder, **{field: SLOW}))
    # Its layers are in its files; the words only select them.
    assert lk.attach(build("llama"), adapter).sites == adapter.sites


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_ranks_that_takes_for_ever_is_refused(
    folder: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "SLOWEST_MATCH_S", 0.05)
    with pytest.raises(AdapterFileError, match=r"takes more than 0\.05 s"):
        lk.Adapter.load(edit(folder, **{field: {SLOW: 4}}))


def test_ranges_of_blocks_without_end_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="goes beyond block"):
        lk.LoRAConfig(layers="0-99999999999")
    with pytest.raises((AdapterFileError, ConfigError), match="goes beyond block"):
        lk.Adapter.load(edit(folder, layers_to_transform=[99999999999]))


# Chat templates.

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROWS = "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}"
GROWS += "{% endfor %}{{ ns.x | length }}"
WIDE = "{{ 'a' * 10000000000 }}"
PADDED = "{{ 'a' | center(10000000000) }}"
LOREM = "{{ lipsum(n=99999999) }}"
MANY = "{% for a in range(9999) %}" + "many words" * 100 + "{% endfor %}"
MESSAGES = MessagesRow(
    messages=(Message(role="user", content="a"), Message(role="assistant", content="b"))
)


def template(text: str) -> ChatTemplate:
    return ChatTemplate(build_tokenizer(chat_template=text))


@pytest.mark.parametrize("text", [LOOPS, GROWS, WIDE, PADDED, LOREM, MANY])
def test_a_template_without_end_stops(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(template_limits, "MOST_CHARACTERS", 10**6)
    monkeypatch.setattr(template_limits, "MOST_BYTES", 2**28)
    with pytest.raises(UnusableRowError, match=r"the chat template (takes more|writes)"):
        template(text).prompt(MESSAGES)
    assert template("{{ messages[0].content }}").prompt(MESSAGES)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux")
def test_a_limit_of_memory_is_taken_off_by_the_last_thread_within_it() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = template_limits.MemoryLimit()
    limit.__enter__()
    within = resource.getrlimit(resource.RLIMIT_AS)
    limit.__enter__()
    limit.__exit__()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] >= within[0] != before[0]
    limit.__exit__()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("text", ["{{ 9 ** 9 ** 9 ** 9 }}", "{% set x = 2**(2**50) %}"])
def test_a_template_with_powers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="computes a power"):
        template(text)


def test_a_template_of_a_megabyte_is_refused() -> None:
    with pytest.raises(DataError, match="characters: it is none"):
        template("a" * (2**20 + 1))


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_reaches_nothing_of_python(text: str) -> None:
    with pytest.raises(UnusableRowError, match="the chat template refuses the messages"):
        template(text).prompt(MESSAGES)


# Code.


def with_code(folder: Path, **mapped: str) -> Path:
    """Let a model's folder name code of its own, which leaves a mark where it runs."""
    folder.mkdir(exist_ok=True)
    mark = folder / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: pass\n")
    return mark


@pytest.mark.parametrize("read", [load_model, own_task, own_classes])
def test_a_base_with_code_of_its_own_runs_none(
    read: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = with_code(tmp_path)
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    build_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    with pytest.raises(ModelError, match="lorakit runs no code that comes with a model"):
        read(tmp_path)
    assert not mark.exists()


def test_an_adapter_s_other_files_are_not_read(folder: Path) -> None:
    mark = with_code(folder)
    config = {"auto_map": {"AutoTokenizer": ["own.Config", None]}, "chat_template": LOOPS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(LOOPS)
    (folder / "tokenizer.json").write_text("[" * 10**6)
    lk.attach(build("llama"), lk.Adapter.load(folder))
    assert not mark.exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    build("llama", vocab_size=70).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"writes tokens up to 257, and the model's embedding has"):
        load_model(tmp_path)


# Cards and logs.


@pytest.mark.parametrize("scores", ["text", [1], {"a": "b", "c": {"d": 1}, "e": None, "loss": 0.5}])
def test_scores_that_are_no_numbers_are_not_shown(folder: Path, scores: object) -> None:
    adapter = replace(lk.Adapter.load(folder), card={"scores": scores, "step": [1]})
    shown = adapter_page(adapter, AdapterFindings(), name="<script>").html()
    assert ("0.5" in shown) == isinstance(scores, dict)
    assert "<script></title>" not in shown


def test_a_log_is_numbers_by_step(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1, "loss": "a", "eval_loss": 2.0}\n{"step": [1], "loss": 1}\n7\n')
    assert log_of(tmp_path) == [{"step": 1, "eval_loss": 2.0}]
    file.write_text("[" * 10**6)
    assert log_of(tmp_path) == []
    with file.open("r+b") as opened:
        opened.truncate(2**40)
    assert log_of(tmp_path) == []


# Served.


def test_a_served_adapter_s_template_is_within_limits(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.2)
    adapter = lk.Adapter.load(folder)
    for name, text in (("loops", LOOPS), ("power", "{{ 9 ** 9 }}"), ("long", "a" * (2**20 + 1))):
        card = {"chat_template": text, "rows_kind": "messages"}
        replace(adapter, card=card).save(tmp_path / "served" / name)
    catalog = Catalog(build("llama"), build_tokenizer(), "tiny", folder=tmp_path / "served")
    with pytest.raises(ConfigError, match="2 problems") as raised:
        catalog.load_all()
    assert "power: the chat template computes a power" in str(raised.value)
    assert list(catalog.adapters) == ["loops"]
    with pytest.raises(DataError, match="the chat template takes more"):
        chat_ids(catalog.choose("loops"), MESSAGES.messages[:1])


# Words of users.


def test_a_run_keeps_no_words_of_its_rows(
    tmp_path: Path,
    tiny_llama: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Prompts and answers are in no log, no message and no file of the run."""
    caplog.set_level(logging.DEBUG)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "red secretword", "completion": "cat hiddenword"}
    rows.write_text("\n".join([json.dumps(row)] * 8))
    config = TrainConfig(
        model=str(tiny_llama),
        out=tmp_path / "run",
        data=DataConfig(train=str(rows), validation=str(rows)),
        dtype="float32",
        steps=2,
        batch_size=4,
    )
    train(config)
    written = [f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()]
    texts = [caplog.text, *capfd.readouterr(), *(data.decode(errors="ignore") for data in written)]
    assert any("lora_a" in text for text in texts)
    assert not any("secretword" in text or "hiddenword" in text for text in texts)
