"""The model's own attention and ours take turns: who answers when, and nothing is left over."""

import copy

import pytest
import torch

import lorakit as lk
from lorakit.data.packing import choose_packing
from lorakit.errors import ModelError
from lorakit.kernels.packed_sequences import PackedSequences
from lorakit.models.attention import attention_within, takes_attention_functions
from mixtures import mixture
from references import attach_random, checkpoint_blocks
from tiny_models import build

LENGTHS = (5, 1, 7)


def joined(*, width=13):
    ids = torch.randint(3, 64, (1, width), generator=torch.Generator().manual_seed(0))
    positions = [p for n in LENGTHS for p in range(n)]
    positions += [0] * (width - len(positions))
    return {"input_ids": ids, "position_ids": torch.tensor([positions])}


def logits(model, batch):
    packed = PackedSequences((LENGTHS,), batch["input_ids"].shape[1])
    with torch.no_grad(), attention_within(model, packed):
        return model(**batch).logits[0]


DECODERS = ("llama", "gpt2", "opt", "gpt_neox", "phi", "phi3", "mistral", "gemma2", "qwen2")


def test_sinks_are_part_of_the_attention_within_a_sequence():
    model = mixture("gpt_oss")
    packing = choose_packing(model, task="generation", packing="on")
    assert packing.joined


@pytest.mark.parametrize("family", DECODERS)
def test_tokens_of_one_sequence_leave_every_bit_of_the_others(family):
    model = build(family)
    attach_random(model, targets=("all-linear",))
    batch = joined()
    before = logits(model, batch)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, 6:] += 1 - 2 * (batch["input_ids"][0, 6:] == 63)
    after = logits(model, batch)
    assert torch.equal(before[:6], after[:6])
    assert not torch.isclose(before[6:], after[6:]).all(dim=-1).any()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_sequence_that_is_no_number_stays_alone(family):
    model = build(family)
    batch = joined()
    batch["input_ids"][0, :] = batch["input_ids"][0, :].clamp(max=60)
    batch["input_ids"][0, 5] = 63
    before = logits(model, batch)
    with torch.no_grad():
        model.get_input_embeddings().weight[63] = torch.nan
    after = logits(model, batch)
    assert after[5].isnan().any()
    others = [t for t in range(13) if t != 5]
    assert torch.equal(before[others], after[others])


def test_padding_behind_the_sequences_changes_nothing():
    model = build("llama")
    batch, padded = joined(), joined(width=20)
    padded["input_ids"][0, :13] = batch["input_ids"][0]
    found = logits(model, padded)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:13], logits(model, batch))


def test_outside_and_after_errors_the_models_own_attention_answers():
    model = build("llama", attn_implementation="eager")
    batch = joined()
    with torch.no_grad():
        expected = model(**batch).logits
        with pytest.raises(IndexError), attention_within(model, PackedSequences((LENGTHS,), 13)):
            model(torch.full((1, 13), 64))
        assert model.config._attn_implementation == "eager"
        assert torch.equal(model(**batch).logits, expected)
        with attention_within(model, None):
            assert torch.equal(model(**batch).logits, expected)


def test_blocks_nest_and_do_not_concern_other_models():
    model, other = build("llama"), build("llama", seed=1)
    batch, copied = joined(), copy.deepcopy(model)
    with torch.no_grad():
        own, others = logits(model, batch), other(**batch).logits
        with attention_within(model, PackedSequences(((13,),), 13)):
            whole = model(**batch).logits[0]
            assert torch.equal(logits(model, batch), own)
            assert torch.equal(model(**batch).logits[0], whole)
            assert torch.equal(other(**batch).logits, others)
            assert copied.config._attn_implementation == "sdpa"
    assert not torch.allclose(own, whole)


def test_a_cache_or_another_shape_is_refused_and_generation_works_afterwards():
    model = build("llama")
    prompt = torch.tensor([[3, 4, 5]])
    expected = model.generate(prompt, max_new_tokens=3, do_sample=False)
    with attention_within(model, PackedSequences(((3,),), 3)):
        with pytest.raises(ModelError, match=r"keys of 1×4 tokens, not \(1, 3\)"):
            model.generate(prompt, max_new_tokens=3, do_sample=False)
        with pytest.raises(ModelError, match="queries of 2×3 tokens"):
            model(prompt.repeat(2, 1))
    assert torch.equal(model.generate(prompt, max_new_tokens=3, do_sample=False), expected)


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"s_aux": torch.ones(4, requires_grad=True)}, "its sinks are trained"),
        ({"attention_mask": torch.zeros(1, 1, 13, 13)}, "a mask of its own"),
    ],
)
def test_what_the_function_cannot_do_is_refused(keywords, problem):
    model = build("llama")
    refusal = rf"LlamaAttention cannot keep packed sequences apart.*\n.*{problem}"
    with (
        attention_within(model, PackedSequences((LENGTHS,), 13)),
        pytest.raises(ModelError, match=refusal),
    ):
        model(**joined(), **keywords)


def test_gradient_checkpointing_draws_the_same_dropout_again():
    found = {}
    for checkpointing in (False, True):
        model = build("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
        attach_random(model, targets=("all-linear",))
        lk.switch(model, "default")
        if checkpointing:
            checkpoint_blocks(model, {"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        with attention_within(model, PackedSequences((LENGTHS,), 13)):
            model(**joined(), use_cache=False).logits.square().mean().backward()
        found[checkpointing] = [p.grad for p in model.parameters() if p.grad is not None]
    for without, with_it in zip(found[False], found[True], strict=True):
        assert torch.equal(without, with_it)


def test_families_with_attention_of_their_own_are_known():
    own = ("bloom", "gptj", "falcon", "t5", "deberta-v2")
    assert not any(takes_attention_functions(build(family)) for family in own)
    assert all(takes_attention_functions(build(family)) for family in (*DECODERS, "bert"))
