"""Joined rows train as padded ones do, and models that cannot join rows are told from others."""

import contextlib
import itertools
import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import lorakit as lk
import lorakit.data.packing as packing_module
import lorakit.training.prepare as preparation
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.data.batches import training_batch
from lorakit.data.collate import PACKED, Collator
from lorakit.data.packing import PLAIN, Packing, choose_packing
from lorakit.data.samples import Example
from lorakit.errors import ConfigError
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.attention import attention_within
from lorakit.training.loss import Loss
from lorakit.training.run import train
from lorakit.training.sweep.joint_step import MicroBatch, joint_losses
from references import attach_random, checkpoint_blocks
from tiny_models import build

WINDOW = {"sliding_window": 3}
JOINING: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    # Scores are capped at a value that they reach.
    "gemma2": {**WINDOW, "attn_logit_softcapping": 0.05},
    "gemma3_text": WINDOW,
    "smollm3": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "opt": {"dropout": 0.0},
    "phi": {},
    "phi3": WINDOW,
}
"""Families that can, with settings that make their attention worth a test."""
PADDING = ("bloom", "gptj", "falcon")


def examples(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in lengths]
    return [
        Example(input_ids=row, labels=[-100] * prompt + row[prompt:])
        for row, prompt in zip(rows, (n // 3 for n in lengths), strict=True)
    ]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return AutoTokenizer.from_pretrained(tiny_llama)


def batches(model, tokenizer, names, packing):
    collate = Collator(tokenizer, packing)
    rows = {"one": examples(7, 2, 9, 1, seed=1), "two": examples(4, 8, seed=2)}
    return [
        MicroBatch(name=name, inputs=collate(rows[name]), loss=Loss("generation"), items=None)
        for name in names
    ]


def losses_and_gradients(model, tokenizer, names, packing):
    model.zero_grad()
    losses = joint_losses(model, batches(model, tokenizer, names, packing), pad_id=0)
    return losses, [p.grad for name in names for _, p in adapter_parameters(model, name)]


def assert_equal(found, expected, *, tolerance):
    for mine, theirs in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@sampled(("family", "checkpointing"), list(itertools.product(JOINING, [False, True])), share=4)
def test_joined_rows_have_the_loss_and_gradients_of_padded_ones(tokenizer, family, checkpointing):
    # Of float64 and padding this family's own code makes NaN, where a window is all padding.
    dtype, tolerance = (torch.float32, 1e-5) if family == "gemma2" else (torch.float64, 1e-10)
    model = build(family, **JOINING[family]).to(dtype)
    packing = choose_packing(model, task="generation", packing="on")
    for seed, name in enumerate(("one", "two")):
        attach_random(model, name, seed=seed, targets=("all-linear",), rank=2 + seed)
    model.to(dtype)
    if checkpointing:
        checkpoint_blocks(model, {"use_reentrant": True})
        model.config.use_cache = False
    alone = [losses_and_gradients(model, tokenizer, [name], PLAIN) for name in ("one", "two")]
    for name, expected in zip(("one", "two"), alone, strict=True):
        assert_equal(
            losses_and_gradients(model, tokenizer, [name], packing), expected, tolerance=tolerance
        )
    joint = losses_and_gradients(model, tokenizer, ["one", "two"], packing)
    both = [[x for each in alone for x in each[part]] for part in (0, 1)]
    assert_equal(joint, both, tolerance=tolerance)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "gpt2"])
def test_padded_rows_of_classifiers_keep_their_loss_and_gradients(tokenizer, family):
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    off |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    off |= {"summary_last_dropout": 0.0, "classifier_dropout": 0.0, **JOINING["gpt2"]}
    model = build(family, head="ForSequenceClassification", **off).double()
    packing = choose_packing(model, task="classification", packing="auto")
    assert packing.segmented
    assert not packing.joined
    attach_random(model, "one", targets=("all-linear",))
    rows = [
        Example(input_ids=e.input_ids, labels=n % 2) for n, e in enumerate(examples(7, 2, 9, 1))
    ]
    found = []
    for each in (PLAIN, packing):
        collate = Collator(tokenizer, each)
        batch = MicroBatch(
            name="one", inputs=collate(rows), loss=Loss("classification"), items=None
        )
        model.double().zero_grad()
        losses = joint_losses(model, [batch], pad_id=0)
        found.append((losses, [p.grad for _, p in adapter_parameters(model, "one")]))
    assert_equal(found[1], found[0], tolerance=1e-10)


def test_a_joined_batch_holds_the_same_rows_in_the_same_order(tokenizer):
    rows = examples(5, 1, 3)
    collate = Collator(tokenizer, Packing(joined=True))
    batch, padded = collate(rows), training_batch(rows, pad_id=0)
    real = padded["attention_mask"].bool()
    assert batch["input_ids"][0].tolist() == padded["input_ids"][real].tolist()
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    padded["labels"][:, 0] = -100
    assert batch["labels"][0].tolist() == padded["labels"][real].tolist()
    assert batch[PACKED].lengths == ((5, 1, 3),)


@pytest.mark.parametrize("family", PADDING)
def test_families_that_cannot_join_rows_get_batches_of_like_length(family):
    model = build(family)
    packing = choose_packing(model, task="generation", packing="auto")
    assert packing.by_length
    assert not packing.joined
    assert not packing.segmented
    assert f"because {family} has attention of its own" in str(packing)
    with pytest.raises(ConfigError, match=f"packing is on, but {family} has attention of its own"):
        choose_packing(model, task="generation", packing="on")
    assert choose_packing(model, task="generation", packing="off") == PLAIN


def test_a_trial_leaves_model_and_random_numbers_as_they_were():
    model = build("gpt2", attn_pdrop=0.5).train()
    state = torch.get_rng_state()
    assert choose_packing(model, task="generation", packing="auto").joined
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_model_whose_rows_see_each_other_is_found_out(monkeypatch, family, dtype):
    model = build(family).to(dtype)
    assert choose_packing(model, task="generation", packing="auto").joined

    def one_segment(model, packed):
        width = packed.width
        return attention_within(model, PackedSequences(((width,),) * len(packed.lengths), width))

    monkeypatch.setattr(packing_module, "attention_within", one_segment)
    packing = choose_packing(model, task="generation", packing="auto")
    assert not packing.joined
    assert "the logits of" in packing.reason


def test_a_model_that_takes_no_positions_or_raises_is_left_padded(monkeypatch):
    model = build("llama")
    forward = type(model).forward

    def without_positions(self, input_ids=None, attention_mask=None, **kwargs):
        return forward(self, input_ids, attention_mask, **kwargs)

    monkeypatch.setattr(type(model), "forward", without_positions)
    packing = choose_packing(model, task="generation", packing="auto")
    assert "llama takes no position_ids" in packing.reason
    assert packing.segmented
    monkeypatch.undo()

    @contextlib.contextmanager
    def failing(model, packed):
        raise ValueError("no packed sequences here")
        yield

    monkeypatch.setattr(packing_module, "attention_within", failing)
    packing = choose_packing(model, task="generation", packing="auto")
    assert packing.reason == "llama fails with packed sequences: no packed sequences here"
    assert not packing.segmented


@pytest.fixture
def uneven_rows(tmp_path):
    """A file of rows of very different lengths."""
    file = tmp_path / "uneven.jsonl"
    words = ("red", "green", "blue", "cat", "dog", "bird", "fish")
    rows = [" ".join(words[(row + i) % 7] for i in range(1 + row % 9)) for row in range(64)]
    file.write_text("\n".join(json.dumps({"prompt": r, "completion": r}) for r in rows))
    return file


@pytest.fixture
def settings(tiny_llama, uneven_rows, tmp_path):
    """A maker of settings for a short run."""

    def make(**operations):
        values = {
            "model": str(tiny_llama),
            "out": tmp_path / "run",
            "lora": LoRAConfig(rank=4, targets=("all-linear",)),
            "data": DataConfig(train=str(uneven_rows)),
            "dtype": "float32",
            "steps": 12,
            "save_every": 5,
            "warmup_steps": 2,
        }
        return TrainConfig(**{**values, **operations})

    return make


@pytest.fixture
def tiny_bloom(tiny_llama, tmp_path):
    """The folder of a tiny model that cannot join rows."""
    folder = tmp_path / "tiny-bloom"
    build("bloom").save_pretrained(folder)
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def logged(result):
    return [json.loads(line) for line in (result.out / "log.jsonl").read_text().splitlines()]


@pytest.mark.thorough
def test_a_run_has_the_same_losses_joined_and_padded_and_tells_its_padding(
    settings, tmp_path, monkeypatch
):
    prepare_all = preparation.prepare_all

    def in_float64(configs, *more, **given):
        prepared = prepare_all(configs, *more, **given)
        for each in prepared.values():
            each.model.double()
        return prepared

    monkeypatch.setattr(preparation, "prepare_all", in_float64)
    joined, padded = (
        train(settings(packing=packing, out=tmp_path / packing)) for packing in ("on", "off")
    )
    losses = [[e["loss"] for e in logged(each) if "loss" in e] for each in (joined, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert 0.2 < padded.padding < 0.6
    assert joined.padding < 0.5 * padded.padding
    tokens = [sum(e["tokens"] for e in logged(each) if "tokens" in e) for each in (joined, padded)]
    real = [
        count * (1 - each.padding) for count, each in zip(tokens, (joined, padded), strict=True)
    ]
    assert real[0] == pytest.approx(real[1], rel=1e-3)


@pytest.mark.thorough
def test_batches_of_like_length_pad_less_and_resume_to_the_same_bytes(
    settings, tiny_bloom, tmp_path
):
    whole = train(settings(model=str(tiny_bloom), out=tmp_path / "whole"))
    plain = train(settings(model=str(tiny_bloom), out=tmp_path / "plain", packing="off"))
    assert whole.padding < 0.5 * plain.padding
    # What a run that was killed early in its second epoch would have left.
    cut = tmp_path / "cut"
    (cut / "checkpoints").mkdir(parents=True)
    shutil.copytree(whole.out / "checkpoints/checkpoint-10", cut / "checkpoints/checkpoint-10")
    resumed = train(settings(model=str(tiny_bloom), out=cut, resume=True))
    for name in ("adapter_model.safetensors", "lorakit.json"):
        assert (resumed.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert lk.Adapter.load(resumed.out).card["step"] == 12


def test_packing_that_a_model_cannot_do_is_told_before_anything_is_written(settings, tiny_bloom):
    config = settings(model=str(tiny_bloom), packing="on")
    with pytest.raises(ConfigError, match="packing is on, but bloom has attention of its own"):
        train(config)
    assert not config.out.exists()
