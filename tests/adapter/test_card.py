"""What a training card says of an adapter's use, and the chat template in an adapter's folder."""

import json
from dataclasses import replace

import pytest

import lorakit as lk
from lorakit.adapter.card import TrainedUse
from lorakit.adapter.folder_write import save_peft
from lorakit.attachment.open_model import open_model
from lorakit.errors import AdapterFileError
from references import attach_random

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def base(tiny_llama):
    return lk.load_model(tiny_llama)


@pytest.fixture
def adapter(base):
    model, _ = base
    attach_random(model)
    made = lk.extract(model)
    lk.detach(model)
    return made


@pytest.fixture
def peft_folder(adapter, tmp_path):
    """PEFT's two files."""
    save_peft(adapter, tmp_path / "peft")
    return tmp_path / "peft"


def test_every_problem_of_a_card_is_told_and_the_adapter_can_be_attached(base, adapter, tiny_llama):
    card = {"task": "dance", "labels": 3, "data": {"max_lenght": 9}, "end_tokens": ["x"]}
    damaged = replace(adapter, card=card)
    for use in (
        lambda: open_model(damaged, model=str(tiny_llama)),
        lambda: damaged.load_base(str(tiny_llama)),
        lambda: lk.generate("red", adapter=damaged, model=base[0], tokenizer=base[1]),
    ):
        with pytest.raises(AdapterFileError, match="the adapter's training card") as caught:
            use()
        for told in ("task: ", "labels: ", "data.max_lenght: unknown", "end_tokens.0: "):
            assert told in str(caught.value)
    with pytest.raises(AdapterFileError, match="data: "):
        TrainedUse.on({"data": "rows.csv"})
    assert lk.attach(base[0], damaged).parameters == adapter.parameters


def test_a_card_says_how_prompts_are_asked():
    assert not TrainedUse.on({}).as_messages
    assert TrainedUse.on({"rows_kind": "messages"}).as_messages
    assert TrainedUse.on({"chat_template": TEMPLATE}).as_messages
    assert not TrainedUse.on({"chat_template": TEMPLATE, "rows_kind": "prompt"}).as_messages


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_adapter_is_asked_through_the_chat_template_of_its_folder(
    file, base, peft_folder, tiny_llama
):
    text = TEMPLATE if file.endswith(".jinja") else json.dumps({"chat_template": TEMPLATE})
    (peft_folder / file).write_text(text)
    with_template = lk.Adapter.load(peft_folder)
    again = lk.Adapter.load(with_template.save(peft_folder.parent / "ours"))
    assert with_template.card["chat_template"] == again.card["chat_template"] == TEMPLATE
    model, tokenizer = base
    before = tokenizer.chat_template
    for source in (peft_folder, again):
        opened = open_model(source, model=str(tiny_llama))
        assert opened.tokenizer.chat_template == TEMPLATE
        assert opened.base_template == before
    loaded = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 4}
    (asked,) = lk.generate("red", adapter=peft_folder, **loaded)
    (written,) = lk.generate("<user>red", adapter=_without_newline(again), chat=False, **loaded)
    assert asked == written
    assert tokenizer.chat_template == before


def _without_newline(adapter):
    return replace(adapter, card={"data": {"separator": ""}})


def test_the_base_of_a_peft_folder_is_the_one_that_its_settings_name(peft_folder, tiny_llama):
    assert lk.Adapter.load(peft_folder).base_name == str(tiny_llama)
    assert open_model(peft_folder).adapter.base is None
    assert replace(lk.Adapter.load(peft_folder), card={"base_model": 3}).base_name == ""


def test_a_damaged_file_with_a_template_is_refused(peft_folder):
    (peft_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(AdapterFileError, match=r"tokenizer_config\.json  is not JSON"):
        lk.Adapter.load(peft_folder)
    (peft_folder / "tokenizer_config.json").write_text('{"chat_template": [{"name": "a"}]}')
    assert "chat_template" not in lk.Adapter.load(peft_folder).card
    (peft_folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(AdapterFileError, match=r"chat_template\.jinja  is not UTF-8 \(byte 0\)"):
        lk.Adapter.load(peft_folder)
