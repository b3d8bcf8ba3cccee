"""PreEmbed and PreLayer: what they train, how they start, and what the model then computes."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.config.methods import LoRAConfig, PrefixConfig
from lorakit.errors import AdapterFileError, MergeError, RouteError, TargetError
from prefix_reference import (
    CAUSAL,
    ENCODERS,
    INFIX,
    PREFIX,
    bare,
    expected,
    own_positions,
    prefixed,
    row_with_tokens,
    run,
)
from references import base_hash, checkpoint_blocks, outputs, randomise, with_updates
from tiny_models import build, example_inputs

EVERY = pytest.mark.parametrize("every_layer", [False, True], ids=["embedding", "layer"])
LENGTHS = (7, 4, 6)


def padded(side, *, seed=0):
    """Rows of several lengths, and the batch that pads them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in LENGTHS]
    longest = max(LENGTHS)
    ids, mask = [], []
    for row in rows:
        pad = [0] * (longest - len(row))
        ids.append(row + pad if side == "right" else pad + row)
        ones = [1] * len(row)
        mask.append(ones + pad if side == "right" else pad + ones)
    return rows, {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def with_positions(model, batch):
    """A batch with the positions that generate would give."""
    if model.config.model_type in ("bloom",):
        return batch
    return batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


@EVERY
@pytest.mark.parametrize(
    ("family", "side"),
    # BLOOM's own answer to padding on the left is NaN in float64.
    [(f, s) for f in CAUSAL for s in ("left", "right") if (f, s) != ("bloom", "left")],
)
def test_logits_of_texts_are_those_of_rows_with_trained_embeddings(family, side, every_layer):
    model = prefixed(family, every_layer=every_layer)
    tensors, base = lk.extract(model).tensors, bare(model)
    rows, batch = padded(side)
    found = outputs(model, with_positions(model, batch))
    assert found.shape[1] == max(LENGTHS)
    for row, logits, mask in zip(rows, found, batch["attention_mask"], strict=True):
        longer = row_with_tokens(row, causal=True)
        wanted = expected(base, tensors, longer)[own_positions(longer, causal=True)]
        torch.testing.assert_close(logits[mask.bool()], wanted, rtol=1e-9, atol=1e-9)


@EVERY
@sampled("family", ENCODERS)
def test_classes_are_those_of_rows_with_trained_embeddings(family, every_layer):
    model = prefixed(family, every_layer=every_layer)
    tensors, base = lk.extract(model).tensors, bare(model)
    tensors = {n: t for n, t in tensors.items() if n.endswith(".prompt")}
    lk.attach(copied := copy.deepcopy(base), lk.extract(model), allow_other_base=True)
    head = {n: p for n, p in lk.extract(model).tensors.items() if not n.endswith(".prompt")}
    with torch.no_grad():
        for name, value in head.items():
            base.get_parameter(name).copy_(value)
    rows, batch = padded("right")
    found = outputs(copied, batch)
    for row, logits in zip(rows, found, strict=True):
        wanted = expected(base, tensors, row_with_tokens(row, causal=False))
        torch.testing.assert_close(logits, wanted, rtol=1e-8, atol=1e-8)


def test_a_decoder_that_classifies_reads_the_last_trained_token():
    model = prefixed("gpt2", model=build("gpt2", head="ForSequenceClassification", num_labels=3))
    tensors = lk.extract(model).tensors
    prompts = {n: t for n, t in tensors.items() if n.endswith(".prompt")}
    base = bare(model)
    with torch.no_grad():
        base.score.weight.copy_(tensors["score.weight"])
    rows, batch = padded("right")
    found = outputs(model, batch)
    for row, logits in zip(rows, found, strict=True):
        longer = row_with_tokens(row, causal=True)
        torch.testing.assert_close(logits, expected(base, prompts, longer), rtol=1e-9, atol=1e-9)


@sampled("family", ["llama", "gpt2", "bert", "roberta", "deberta-v2"])
def test_parameters_are_those_of_the_paper(family):
    model = build(family, num_hidden_layers=3)
    settings = {"prefix": PREFIX, "infix": INFIX, "modules_to_save": ()}
    embedding = lk.plan(model, PrefixConfig(**settings))
    layer = lk.plan(model, PrefixConfig(**settings, every_layer=True))
    assert embedding.parameters == 32 * (PREFIX + INFIX)
    assert layer.parameters == 3 * 32 * (PREFIX + INFIX)


def test_narrow_embeddings_get_narrow_vectors():
    layer = lk.plan(build("opt"), PrefixConfig(prefix=1, infix=0, every_layer=True))
    assert layer.shapes == {
        "model.decoder.embed_tokens.prompt": (1, 16),
        "model.decoder.layers.0.prompt": (1, 32),
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_prefix_layer_starts_as_prefix_embedding_with_tokens_of_the_vocabulary(family):
    model = build(family).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    lk.attach(model, PrefixConfig(prefix=4, infix=0, every_layer=True))
    torch.manual_seed(1)
    lk.attach(twin, PrefixConfig(prefix=4, infix=0))
    inputs = example_inputs(model)
    found = outputs(model, inputs)
    torch.testing.assert_close(found, outputs(twin, inputs), rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    tokens = torch.randint(64, (4,))
    longer = torch.cat([tokens.expand(2, -1), inputs["input_ids"]], 1)
    lk.detach(twin)
    plain = twin(input_ids=longer).logits[:, 4:]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_a_start_is_that_of_the_base_whatever_else_is_attached():
    model, other = build("llama"), prefixed("llama", model=build("llama"))
    other.float()
    torch.manual_seed(2)
    lk.attach(model, PrefixConfig(every_layer=True), name="new")
    torch.manual_seed(2)
    lk.attach(other, PrefixConfig(every_layer=True), name="new")
    found, wanted = lk.extract(other, "new").tensors, lk.extract(model, "new").tensors
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_random_start_is_as_spread_as_the_embeddings():
    model = build("gemma")
    lk.attach(model, PrefixConfig(prefix=20, infix=10, init="random"))
    vectors = lk.extract(model).tensors["model.embed_tokens.prompt"]
    lk.switch(model, None)
    looked_up = model.model.embed_tokens(torch.arange(64))
    assert float(vectors.std()) == pytest.approx(float(looked_up.std()), rel=0.15)


@EVERY
@sampled("family", ["llama", "gpt2", "opt", "bert", "roberta", "deberta-v2"])
def test_saved_and_loaded_it_answers_the_same_bit_for_bit(family, every_layer, tmp_path):
    model = prefixed(family, every_layer=every_layer).float()
    inputs = example_inputs(model)
    names, before = [n for n, _ in bare(model).named_parameters()], base_hash(bare(model))
    found = outputs(model, inputs)
    lk.extract(model).save(tmp_path / "saved")
    lk.detach(model)
    assert base_hash(model) == before
    assert [n for n, _ in model.named_parameters()] == names
    assert not model._forward_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks
    lk.attach(model, lk.Adapter.load(tmp_path / "saved"))
    assert torch.equal(outputs(model, inputs), found)


def test_only_the_vectors_train_and_infix_and_prefix_both_do():
    model = prefixed("llama")
    model.train()
    lk.detach(model)
    lk.attach(model, PrefixConfig(prefix=PREFIX, infix=INFIX, every_layer=True))
    randomise(model, std=0.5)
    inputs = example_inputs(model)
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    model(**inputs, labels=labels).loss.backward()
    moved = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(moved) == 3
    assert all(".adapter_bank." in name for name in moved)
    assert all(gradient.any(1).all() for gradient in moved.values())


def test_gradients_are_those_of_the_reference():
    model = prefixed("gpt2")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.shape[0] == PREFIX + INFIX)
    tensors = {n: t.double().requires_grad_() for n, t in lk.extract(model).tensors.items()}
    base = bare(model)
    row = [5, 6, 7, 8]
    longer = row_with_tokens(row, causal=True)
    run(base, tensors, longer)[own_positions(longer, causal=True)].square().sum().backward()
    model(torch.tensor([row])).logits.square().sum().backward()
    found = {n: p.grad for n, p in adapter_parameters(model, "default")}
    assert found.keys() == tensors.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, tensors[name].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_recomputed_blocks_have_the_tokens_of_their_own_forward_pass(family, reentrant):
    model = prefixed(family).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapter_bank." in name)
    one, ids = example_inputs(model), example_inputs(model, rows=3, seed=1)["input_ids"]
    other = {"input_ids": ids[:, :4], "attention_mask": None}

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        losses = [model(**each).logits.square().sum() for each in (one, other)]
        sum(losses).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    settings = {"use_reentrant": reentrant}
    checkpoint_blocks(model, settings)
    model.disable_input_require_grads()
    found = gradients()
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9)


def test_a_copy_and_a_pickle_answer_the_same_and_keep_nothing_of_calls():
    model = prefixed("llama")
    inputs = example_inputs(model)
    found = outputs(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin, inputs), found)
        lk.detach(twin)
        assert not twin._forward_hooks
        assert not twin._forward_pre_hooks
    assert torch.equal(outputs(model, inputs), found)


def test_it_cannot_merge_and_says_why():
    model = prefixed("llama")
    with pytest.raises(MergeError, match=r"adds tokens to each row.*latency"):
        lk.merge(model)


def test_with_lora_both_count():
    model = build("llama").double()
    lk.attach(
        model, [LoRAConfig(targets=("q", "v", "embed")), PrefixConfig(prefix=PREFIX, infix=INFIX)]
    )
    randomise(model)
    model.double()
    adapter = lk.extract(model)
    assert adapter.method == "lora+prefix-embedding"
    prompts = {n: t for n, t in adapter.tensors.items() if n.endswith(".prompt")}
    base = with_updates(bare(model), {"default": adapter_of_lora(adapter)}, {"default": 1.0})
    row = [5, 6, 7, 8]
    longer = row_with_tokens(row, causal=True)
    wanted = expected(base, prompts, longer)[own_positions(longer, causal=True)]
    found = outputs(model, {"input_ids": torch.tensor([row])})[0]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def adapter_of_lora(adapter):
    tensors = {n: t for n, t in adapter.tensors.items() if not n.endswith(".prompt")}
    return replace(adapter, tensors=tensors)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("vit", {}, "no embedding of tokens"),
        ("llama", {"prefix": 30, "infix": 8}, r"38 tokens.*context of 32"),
        ("llama", {"blocks": ("*.nowhere.*",), "every_layer": True}, "names no module"),
    ],
)
def test_models_that_lack_what_it_needs_are_refused(family, settings, message):
    with pytest.raises(TargetError, match=message):
        lk.attach(build(family), PrefixConfig(**settings))


def test_named_blocks_are_those_of_an_unknown_architecture():
    model, twin = prefixed("llama"), build("llama", num_hidden_layers=3)
    twin.config.model_type = "nobody-knows"
    with pytest.raises(TargetError, match=r"name them in order with prefix\.blocks"):
        lk.attach(twin, PrefixConfig(every_layer=True))
    words = ("re:model.layers.[0-9]+",)
    prefixed("llama", model=twin, blocks=words)
    inputs = example_inputs(model)
    assert torch.equal(outputs(twin, inputs), outputs(model, inputs))


def test_a_file_of_other_numbers_of_tokens_does_not_fit(tmp_path):
    model = prefixed("llama")
    adapter = lk.extract(model)
    wrong = replace(
        adapter, configs=(PrefixConfig(prefix=PREFIX, infix=INFIX + 1, every_layer=True),)
    )
    lk.detach(model)
    with pytest.raises(AdapterFileError, match=r"shape \(5, 32\) in the adapter, \(6, 32\)"):
        lk.attach(model, wrong)


def test_a_part_of_the_model_alone_is_refused_while_it_is_in_use():
    model = prefixed("llama")
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RouteError, match="call the model, not a part of it"):
        model.model(ids)
    lk.switch(model, None)
    assert model.model(ids).last_hidden_state.shape == (1, 3, 32)
