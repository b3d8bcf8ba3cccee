"""Encoders load as what they are, and are neither trained on texts to write, asked nor scored."""

import re

import pytest
import torch
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.errors import ModelError
from tiny_models import build


@pytest.fixture(scope="module")
def masked(tiny_bert, tmp_path_factory):
    """The folder of an encoder whose head fills in masked words."""
    folder = tmp_path_factory.mktemp("models") / "masked"
    build("bert", head="ForMaskedLM").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder)
    return str(folder)


def test_an_encoder_sees_the_tokens_that_it_would_be_trained_to_write(masked):
    model, tokenizer = lk.load_model(masked)
    first, second = tokenizer(["red cat", "red dog"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(torch.stack([first, second])).logits
    assert first[0] == second[0]
    assert not torch.equal(logits[0, 0], logits[1, 0])


def trained(rows, out, masked, **loaded):
    lk.train(lk.TrainConfig(model=masked, out=out, data=rows), **loaded)


def asked(rows, out, masked, **loaded):
    lk.generate("red", **(loaded or {"model": masked}))


def scored(rows, out, masked, **loaded):
    lk.evaluate(data=rows, **(loaded or {"model": masked}))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("use", [trained, asked, scored])
def test_an_encoder_is_refused_where_texts_are_written(use, named, masked, prompt_rows, tmp_path):
    loaded = {} if named else dict(zip(("model", "tokenizer"), lk.load_model(masked), strict=True))
    rows = lk.DataConfig(train=str(prompt_rows), validation=str(prompt_rows))
    who = re.escape(masked) if named else ".*"
    with pytest.raises(ModelError, match=rf"^{who} was asked for generation, .* an encoder \(bert"):
        use(rows, tmp_path / "out", masked, **loaded)
    assert not (tmp_path / "out").exists()
