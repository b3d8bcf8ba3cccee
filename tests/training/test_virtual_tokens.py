"""Training with virtual tokens: rows that have them, joined or padded, alone or in a sweep."""

import json

import pytest
import torch

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.cli.main import main
from lorakit.config.methods import PrefixSettings
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.collate import PACKED, Collator
from lorakit.data.packing import PLAIN, Packing
from lorakit.data.rows import read_rows
from lorakit.errors import ConfigError, TargetError
from lorakit.kernels.choice import use
from lorakit.models.attention import attention_within
from lorakit.training.evaluation import scored
from lorakit.training.lm_loss import item_weight, text_losses
from lorakit.training.loss import Loss
from lorakit.training.memory.memory_setting import training_memory
from lorakit.training.prepare import prepare
from lorakit.training.run import train
from lorakit.training.sweep.sweep import sweep
from lorakit.training.virtual_tokens import encode_for, longest_row
from references import randomise

TOKENS = PrefixSettings(prefix=2, infix=3)


@pytest.fixture
def settings(tiny_llama, prompt_rows, tmp_path):
    """A maker of settings for a short run."""

    def make(**changes):
        values = {
            "model": str(tiny_llama),
            "out": tmp_path / "run",
            "method": ("prefix-layer",),
            "prefix": TOKENS,
            "data": DataConfig(train=str(prompt_rows), validation=str(prompt_rows)),
            "dtype": "float32",
            "steps": 10,
            "batch_size": 4,
            "warmup_steps": 1,
        }
        return TrainConfig(**{**values, **changes})

    return make


def gradients(model):
    found = {n: p.grad.clone() for n, p in adapter_parameters(model, "default")}
    model.zero_grad()
    return found


def step(model, batch):
    batch = dict(batch)
    with attention_within(model, batch.pop(PACKED, None)):
        labels = batch.pop("labels")
        loss, _ = text_losses(model, batch, labels, weights=item_weight(labels, None))
        loss.backward()
    return loss.item()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "method", ["prefix-layer", pytest.param("lora,prefix-embedding", marks=pytest.mark.thorough)]
)
def test_a_run_lowers_the_loss_and_is_scored_the_same_from_its_folder(settings, method):
    config = settings(method=tuple(method.split(",")), steps=12, learning_rate=3e-2)
    result = train(config)
    assert result.last_loss < result.first_loss - 0.03
    model, tokenizer = lk.load_model(config.model)
    lk.attach(model, lk.Adapter.load(config.out))
    rows = read_rows(config.data.validation, config.data)
    encoded = encode_for(model, "default", rows, tokenizer, config.data)
    found = scored(
        model, encoded.examples, loss=Loss("generation"), collate=Collator(tokenizer), batch_size=8
    )
    assert found.scores["loss"] == pytest.approx(result.scores["loss"], rel=1e-4)


def test_loss_and_gradients_are_the_same_joined_padded_recomputed_and_plain(settings):
    prepared = prepare(settings())
    assert prepared.packing.joined
    model = prepared.model.double().train()
    randomise(model, std=0.3)
    rows = prepared.training.examples[:4]
    assert all(max(row.input_ids) == model.config.vocab_size + 4 for row in rows)
    tokenizer = prepared.tokenizer
    wanted_loss = step(model, Collator(tokenizer, PLAIN)(rows))
    wanted = gradients(model)
    joined = Collator(tokenizer, Packing(joined=True, segmented=True, multiple=16))(rows)

    def check():
        found = gradients(model)
        for name, gradient in found.items():
            # Llama's norms are in float32 always.
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)

    assert step(model, joined) == pytest.approx(wanted_loss, rel=1e-9)
    check()
    with use("plain"):
        assert step(model, Collator(tokenizer, PLAIN)(rows)) == pytest.approx(wanted_loss, rel=1e-9)
    check()
    for memory in ("low", "balanced"):
        with training_memory(model, settings(memory=memory)):
            for _ in range(2):
                assert step(model, joined) == pytest.approx(wanted_loss, rel=1e-9)
                check()


def test_two_micro_batches_are_recomputed_each_with_its_own_tokens(settings):
    prepared = prepare(settings())
    model = prepared.model.double().train()
    randomise(model, std=0.3)
    collate = Collator(prepared.tokenizer)
    batches = [collate(prepared.training.examples[:3]), collate(prepared.training.examples[3:5])]
    batches[1] = {name: values[:, :10] for name, values in batches[1].items()}

    def both():
        losses = [
            text_losses(
                model,
                {n: v for n, v in batch.items() if n != "labels"},
                batch["labels"],
                weights=item_weight(batch["labels"], None),
            )[0]
            for batch in batches
        ]
        sum(losses).backward()
        return gradients(model)

    wanted = both()
    with training_memory(model, settings(memory="low")):
        found = both()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)


def test_the_loss_of_prepared_rows_is_that_of_plain_calls(settings):
    prepared = prepare(settings())
    model, collate = prepared.model.double().eval(), Collator(prepared.tokenizer)
    without = prepare(settings(method=("lora",)))
    with torch.no_grad():
        batch = collate(without.training.examples[:4])
        plain = model(**batch).loss
    found = step(model, collate(prepared.training.examples[:4]))
    assert found == pytest.approx(plain.item(), rel=1e-5)


def test_rows_leave_room_in_the_context_and_not_in_max_length(settings):
    data = DataConfig(train=settings().data.train, max_length=6)
    prepared = prepare(settings(data=data))
    assert max(len(row.input_ids) for row in prepared.training.examples) == 6 + 5
    tight = prepare(settings(prefix=PrefixSettings(prefix=20, infix=7)))
    assert longest_row(tight.model, "default") == 5
    assert max(len(row.input_ids) for row in tight.training.examples) == 32
    assert tight.training.report.truncated_prompts > 0
    with pytest.raises(TargetError, match=r"40 tokens.*context of 32"):
        prepare(settings(prefix=PrefixSettings(prefix=20, infix=20)))


def test_texts_have_no_place_for_an_infix(settings, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": "red cat big dog"}) for _ in range(8)))
    data = DataConfig(train=str(file))
    with pytest.raises(ConfigError, match=r"set prefix\.infix to 0"):
        prepare(settings(data=data))
    prepared = prepare(settings(data=data, prefix=PrefixSettings(prefix=2, infix=0)))
    labels = prepared.training.examples[0].labels
    assert isinstance(labels, list)
    assert labels[:3] == [-100] * 3


@pytest.mark.thorough
def test_a_classifier_trains_with_the_tokens_behind_its_first(settings, tiny_bert, label_rows):
    data = DataConfig(train=str(label_rows), validation=str(label_rows))
    config = settings(model=str(tiny_bert), data=data, steps=12, batch_size=8)
    result = train(config)
    assert result.last_loss < result.first_loss
    prepared = prepare(config.model_copy(update={"overwrite": True}))
    row = prepared.training.examples[0].input_ids
    assert row[1:3] == [64, 65]
    assert row[-3:] == [66, 67, 68]


@pytest.mark.thorough
def test_trials_of_a_sweep_train_as_alone(settings, tmp_path):
    trials = [
        {"method": ["prefix-layer"], "name": "layer"},
        {"method": ["prefix-embedding"], "prefix.prefix": 4, "prefix.infix": 0, "name": "few"},
    ]
    data = DataConfig(train=settings().data.train, train_rows=12)
    common = {"steps": 3, "learning_rate": 1e-2, "data": data}
    together = sweep(settings(sweep=trials, out=tmp_path / "sweep", **common))
    assert [each.error for each in together.trials] == [None] * 2
    alone = {
        "layer": settings(out=tmp_path / "layer", **common),
        "few": settings(
            out=tmp_path / "few",
            method=("prefix-embedding",),
            prefix=PrefixSettings(prefix=4, infix=0),
            **common,
        ),
    }
    for name, config in alone.items():
        train(config)
        wanted = lk.Adapter.load(config.out).tensors
        found = lk.Adapter.load(tmp_path / "sweep" / name).tensors
        assert found.keys() == wanted.keys()
        for tensor, values in found.items():
            torch.testing.assert_close(values, wanted[tensor], rtol=1e-3, atol=1e-4)


def test_compiling_is_refused(settings):
    with pytest.raises(ConfigError, match="virtual tokens are put into rows by code"):
        prepare(settings(compile=True))


def test_the_command_trains_evaluates_and_writes(tiny_llama, prompt_rows, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--model", str(tiny_llama), "--out", str(out), "--method", "prefix-embedding"]
    flags += ["--prefix.prefix", "3", "--prefix.infix", "2", "--steps", "3", "--warmup-steps", "1"]
    flags += ["--data.train", str(prompt_rows), "--dtype", "float32"]
    assert main(["train", *flags]) == 0
    shape = lk.Adapter.load(out).tensors["model.embed_tokens.prompt"].shape
    assert shape == (5, 32)
    scored = ["--adapter", str(out), "--max-new-tokens", "4"]
    rows = ["--data.validation", str(prompt_rows), "--data.validation-rows", "4"]
    assert main(["evaluate", *scored, *rows]) == 0
    assert "exact_match" in capsys.readouterr().out
    assert main(["generate", *scored, "--prompt", "red cat"]) == 0
