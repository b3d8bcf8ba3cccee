"""Encoder-decoders: trained, scored, answered, merged, routed, and in PEFT's files."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import lorakit as lk
from lorakit.errors import DataError, LorakitError, ModelError
from tiny_models import bart, build

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

WORDS = ("red", "green", "big", "small", "cat", "dog")


@pytest.fixture(scope="module")
def bases(tiny_bert, tmp_path_factory):
    """Folders of tiny encoder-decoders, by family."""
    folder = tmp_path_factory.mktemp("encoder-decoders")
    for name, model in (("t5", build("t5")), ("bart", bart())):
        model.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of prompts whose answer is their first word."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [draw.choices(WORDS, k=draw.randint(1, 4)) for _ in range(32)]
    lines = (json.dumps({"prompt": " ".join(t), "completion": t[0]}) for t in texts)
    file.write_text("\n".join(lines))
    return str(file)


def trained(base, rows, out, **settings):
    data = lk.DataConfig(train=rows, validation=rows)
    lora = lk.LoRAConfig(rank=4, targets=("q", "v"))
    how = {"steps": 8, "warmup_steps": 0, "learning_rate": 3e-2, "dtype": "float32"} | settings
    return lk.train(lk.TrainConfig(model=str(base), out=out, data=data, lora=lora, **how))


def loss_of(model, tokenizer, rows):
    """The mean loss per target token, as transformers computes it row by row."""
    losses = []
    for line in rows:
        row = json.loads(line)
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        target = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=ids, labels=torch.tensor([target])).logits[0]
        losses += cross_entropy(logits, torch.tensor(target), reduction="none").tolist()
    return sum(losses) / len(losses)


@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.thorough)])
def test_a_run_learns_and_its_folder_is_the_same_to_everyone(family, bases, rows, tmp_path):
    from peft import PeftModel

    base = bases / family
    result = trained(base, rows, tmp_path / "out")
    assert result.last_loss < result.first_loss
    adapter = result.adapter
    assert adapter.card["task_type"] == "SEQ_2_SEQ_LM"
    model, tokenizer = adapter.load_base()
    plain, _ = adapter.load_base()
    lk.attach(model, adapter)
    # The loss is that of transformers, whose own shift makes the decoder's input.
    lines = Path(rows).read_text().splitlines()
    assert loss_of(model, tokenizer, lines) == pytest.approx(result.scores["loss"], abs=1e-5)
    data = lk.DataConfig(validation=rows)
    scores = lk.evaluate(adapter=result.out, data=data, max_new_tokens=3)
    assert scores["loss"] == pytest.approx(result.scores["loss"], abs=1e-5)
    assert {"perplexity", "exact_match"} <= scores.keys()
    peft = PeftModel.from_pretrained(plain, result.out)
    assert type(peft).__name__ == "PeftModelForSeq2SeqLM"
    assert loss_of(peft, tokenizer, lines) == pytest.approx(result.scores["loss"], abs=1e-5)
    # Rows of one batch are answered by adapters of their own, padded or not, merged or not.
    prompts = ["red big cat", "dog"]
    alone = [lk.generate(p, model=model, tokenizer=tokenizer, max_new_tokens=3)[0] for p in prompts]
    with lk.route(model, None):
        bare = lk.generate("dog", model=model, tokenizer=tokenizer, max_new_tokens=3)
    with lk.route(model, ["default", None]):
        mixed = lk.generate(prompts, model=model, tokenizer=tokenizer, max_new_tokens=3)
    assert mixed == [alone[0], bare[0]]
    lk.merge(model)
    assert loss_of(model, tokenizer, lines) == pytest.approx(result.scores["loss"], abs=1e-4)


@pytest.mark.parametrize("method", ["prefix-embedding", "prefix-layer"])
@pytest.mark.parametrize("family", ["t5", pytest.param("bart", marks=pytest.mark.thorough)])
def test_virtual_tokens_are_trained_and_used_in_what_the_encoder_reads(
    family, method, bases, rows, tmp_path
):
    prefix = {"prefix": 2, "infix": 1, "init": "random"}
    how = {"method": method, "prefix": prefix, "learning_rate": 0.3, "steps": 20}
    result = trained(bases / family, rows, tmp_path / "out", **how)
    model, tokenizer = result.adapter.load_base()
    lines = Path(rows).read_text().splitlines()
    assert result.scores["loss"] < loss_of(model, tokenizer, lines)
    lk.attach(model, result.out)
    assert loss_of(model, tokenizer, lines) == pytest.approx(result.scores["loss"], abs=1e-5)
    scores = lk.evaluate(adapter=result.out, data=lk.DataConfig(validation=rows), max_new_tokens=3)
    assert scores["loss"] == pytest.approx(result.scores["loss"], abs=1e-5)
    prompts = ["red big cat", "dog"]
    told = {"model": model, "tokenizer": tokenizer, "max_new_tokens": 3}
    alone = [lk.generate(each, **told)[0] for each in prompts]
    with lk.route(model, ["default", None]):
        mixed = lk.generate(prompts, **told)
    with lk.route(model, None):
        bare = lk.generate("dog", **told)
    assert mixed == [alone[0], bare[0]]


def test_what_an_encoder_decoder_cannot_do_is_said_before_training(bases, rows, tmp_path):
    base = bases / "t5"
    with pytest.raises(ModelError, match="t5 is an encoder-decoder, and this beam search"):
        lk.generate("red", model=str(base), num_beams=2)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "red cat"}))
    with pytest.raises(DataError, match="Give rows with prompt and completion"):
        trained(base, str(texts), tmp_path / "b")
    with pytest.raises(LorakitError, match="packing is on, but t5 has an encoder and a decoder"):
        trained(base, rows, tmp_path / "c", packing="on")


def test_a_prompt_that_is_too_long_keeps_its_beginning_and_its_end_token(bases):
    with pytest.warns(UserWarning, match="1 of 1 prompts have no room"):
        lk.generate(" ".join(["red"] * 40), model=str(bases / "bart"), max_new_tokens=2)


@pytest.mark.thorough
def test_trials_of_a_sweep_have_the_loss_that_they_have_alone(bases, rows, tmp_path):
    alone = trained(bases / "bart", rows, tmp_path / "alone", seed=1)
    data = lk.DataConfig(train=rows, validation=rows)
    how = {"steps": 8, "warmup_steps": 0, "learning_rate": 3e-2, "dtype": "float32"}
    lora = lk.LoRAConfig(rank=4, targets=("q", "v"))
    found = lk.sweep(
        lk.TrainConfig(
            model=str(bases / "bart"),
            out=tmp_path / "sweep",
            data=data,
            lora=lora,
            sweep={"seed": [0, 1]},
            **how,
        )
    )
    assert found.trials[1].trained.scores["loss"] == pytest.approx(alone.scores["loss"], abs=1e-4)
