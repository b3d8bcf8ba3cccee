"""Blocks that recompute: the same gradients, less memory, and none of it below the adapters."""

import copy
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lorakit.training.memory.activation_checkpointing as recompute
from covering import covering
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.errors import ConfigError
from lorakit.training.memory.activation_checkpointing import (
    SavedActivations,
    matmuls,
    narrow_matmuls,
    recomputing,
)
from lorakit.training.memory.memory_setting import check_memory, training_memory
from lorakit.training.run import train
from references import attach_random, checkpoint_blocks
from tiny_models import FAMILIES, build, example_inputs

MEMORY = ("fast", "balanced", "low")
SOME = ("llama", "gpt2", "opt", "bert", "gpt_neox")
# In `make test`: blocks with other calls, inputs and outputs than those of most families.
BALANCED = ("llama", "t5", "vit", "bloom", "falcon", "gemma2", "deberta-v2")


def settings(memory, **changes):
    return TrainConfig(out="unused", memory=memory, **changes)


def gradients(model):
    model.zero_grad()
    torch.manual_seed(0)
    model(**example_inputs(model)).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize(
    ("family", "memory"),
    [
        *(
            pytest.param(each, "low", marks=pytest.mark.thorough if each in BALANCED else ())
            for each in SOME
        ),
        *(
            pytest.param(each, "balanced", marks=() if each in BALANCED else pytest.mark.thorough)
            for each in FAMILIES
        ),
    ],
)
def test_gradients_stay_the_same_bit_for_bit(family, memory):
    model = build(family).double().train()
    attach_random(model, targets=("all-linear",), rank=2, dropout=0.2)
    with training_memory(model, settings("fast")):
        expected = gradients(model)
    with training_memory(model, settings(memory)):
        # What is kept follows from the first backward pass.
        for _ in range(2):
            assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_in_attention_has_the_same_masks(attention):
    model = build("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, attn_implementation=attention).train()
    attach_random(model, targets=("q", "v"))
    expected = gradients(model)
    with training_memory(model, settings("balanced")):
        assert_equal_gradients(gradients(model), expected)


@pytest.fixture
def held_bytes(monkeypatch):
    """A function that counts the bytes a forward pass leaves behind, weights apart."""
    kept = {}

    def note(value):
        if isinstance(value, torch.Tensor):
            kept[value.untyped_storage().data_ptr()] = (value.untyped_storage().nbytes(), value)
        return value

    settle = recompute._Result.settle

    def settle_and_note(result, **options):
        settle(result, **options)
        for value in tree_leaves(result.value):
            note(value)

    monkeypatch.setattr(recompute._Result, "settle", settle_and_note)

    def count(model):
        loss = model(**example_inputs(model)).logits.square().sum()
        kept.clear()
        with saved_tensors_hooks(note, lambda value: value):
            again = model(**example_inputs(model)).logits.square().sum()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        size = sum(bytes for place, (bytes, _) in kept.items() if place not in weights)
        kept.clear()
        (loss + again).backward()
        return size

    return count


@covering(("family", "attention"), itertools.product(SOME, ["eager", "sdpa"]))
def test_each_setting_keeps_less(family, attention, held_bytes):
    model = build(family, attn_implementation=attention).train()
    model.config.use_cache = False
    attach_random(model, targets=("q", "v"), rank=2)
    sizes = [held_bytes(model)]
    for memory in MEMORY:
        with training_memory(model, settings(memory)):
            gradients(model)
            sizes.append(held_bytes(model))
    plain, fast, balanced, low = sizes
    assert low < balanced < fast
    assert fast < plain if family == "llama" else fast == plain


def test_low_computes_no_narrow_product_twice(monkeypatch):
    model = build("llama").train()
    attach_random(model, targets=("all-linear",), rank=2)
    taken = []
    take = recompute._Result.take

    def note(result, operation, arguments):
        made = take(result, operation, arguments)
        taken.append((made is not None, narrow_matmuls(operation, *arguments)))
        return made

    monkeypatch.setattr(recompute._Result, "take", note)
    with recomputing(model, narrow_matmuls):
        gradients(model)
    narrow = [found for found, is_narrow in taken if is_narrow]
    assert len(narrow) == 2 * 7
    assert all(narrow)
    assert not any(found for found, is_narrow in taken if not is_narrow)


@pytest.mark.parametrize("memory", MEMORY)
def test_nothing_below_the_lowest_adapted_layer_has_a_backward_pass(memory):
    model = build("llama", num_hidden_layers=4).train()
    attach_random(model, targets=("v",), layers="2-3")
    outputs = {}

    def note(path, module, inputs, output):
        outputs[path] = output

    for path, module in model.named_modules():
        module.register_forward_hook(partial(note, path))
    with training_memory(model, settings(memory)):
        again = [b.gradient_checkpointing for b in model.model.layers]
        loss = model(**example_inputs(model)).logits.square().sum()
        assert loss.requires_grad
    assert again == [False, False, memory != "fast", memory != "fast"]
    below = ("model.embed_tokens", "model.layers.0", "model.layers.1")
    found = [o for path, o in outputs.items() if path.startswith(below)]
    found.append(outputs["model.layers.2.input_layernorm"])
    tensors = [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]
    assert len(tensors) > 20
    assert not any(value.requires_grad for value in tensors)
    assert outputs["model.layers.2"].grad_fn is not None


class Watch(TorchDispatchMode):
    """Notes the shapes of all float32 results."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.shapes.add(tuple(value.shape))
        return made


@pytest.mark.parametrize("memory", MEMORY)
def test_no_frozen_weight_is_copied_to_float32_in_a_step(memory):
    model = build("llama", intermediate_size=56, vocab_size=72).to(torch.bfloat16).train()
    attach_random(model, targets=("all-linear",), rank=3)
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad}
    both = frozen | {shape[::-1] for shape in frozen}
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    with training_memory(model, settings(memory)):
        gradients(model)
        with Watch() as watch:
            loss = model(**example_inputs(model)).logits.float().square().sum()
            loss.backward()
            optimizer.step()
    assert (3, 32) in watch.shapes  # A, which is float32
    assert not watch.shapes & both
    with Watch() as watch:
        model.lm_head.weight.float()
    assert watch.shapes & both


@pytest.mark.parametrize("fails", [False, True])
def test_blocks_come_back_as_they_were(fails):
    model = build("llama").train()
    attach_random(model)
    checkpoint_blocks(model)
    before = [dict(vars(block)) for block in model.model.layers]
    model.model.layers[1].gradient_checkpointing = False
    before[1]["gradient_checkpointing"] = False
    try:
        with training_memory(model, settings("low")):
            assert not model.config.use_cache
            assert [dict(vars(block)) for block in model.model.layers] != before
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert model.config.use_cache
    assert [dict(vars(block)) for block in model.model.layers] == before


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_during_a_run_trains_alike(make):
    model = build("llama").train()
    attach_random(model)
    expected = gradients(model)
    with training_memory(model, settings("balanced")):
        gradients(model)
        twin = make(model)
    assert_near_gradients(gradients(twin), expected)
    assert_near_gradients(gradients(make(model)), expected)


def assert_near_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)


def test_offload_keeps_the_gradients():
    model = build("llama").train()
    attach_random(model)
    expected = gradients(model)
    with recomputing(model, matmuls, offload=True):
        for _ in range(2):
            assert_equal_gradients(gradients(model), expected)


def recomputed(function, x, memory):
    return checkpoint(function, x, use_reentrant=False, context_fn=memory)


def keep_all():
    return SavedActivations(matmuls, offload=False)


def test_a_product_that_is_written_into_is_not_kept():
    weight, x = torch.randn(6, 6) / 4, torch.randn(5, 6, requires_grad=True)

    def write(x):
        y = x @ weight
        y[:, :3] += y[:, 3:].detach().tanh()
        return (y.exp() @ weight).tanh()

    (expected,) = torch.autograd.grad(write(x).sum(), x)
    memory = keep_all()
    for _ in range(2):
        (found,) = torch.autograd.grad(recomputed(write, x, memory).sum(), x)
        assert torch.equal(found, expected)


def test_a_graph_that_is_kept_gives_its_gradients_twice():
    weight, x = torch.randn(6, 6) / 4, torch.randn(5, 6, requires_grad=True)
    y = recomputed(lambda x: ((x @ weight).tanh() @ weight).tanh(), x, keep_all()).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


def test_results_that_no_recomputation_reaches_are_not_kept():
    weight, x = torch.randn(6, 6) / 4, torch.randn(5, 6, requires_grad=True)
    memory = keep_all()

    def block(x):
        return (x @ weight).exp() @ weight @ weight

    for _ in range(2):
        recomputed(block, x, memory).sum().backward()
    keep, _ = memory()
    with keep:
        block(x)
    # What the last product needs is there before it runs.
    assert [result.value is None for result in keep.results] == [False, False, True]


def test_attention_with_dropout_is_not_kept():
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q = torch.zeros(1, 2, 3, 8)
    assert matmuls(attention, q, q, q)
    assert matmuls(attention, q, q, q, 0.0, True)
    assert not matmuls(attention, q, q, q, 0.1)
    assert not matmuls(attention, q, q, q, dropout_p=0.1)


def test_another_operation_than_in_the_forward_pass_takes_nothing_that_was_kept():
    weight, x = torch.randn(6, 6) / 4, torch.randn(5, 6, requires_grad=True)
    first: list[Any] = []

    def cached(x):
        # As a table that is made once, in the first forward pass.
        if not first:
            first.append(weight[:3] @ weight)
        return (x @ weight + first[0].sum()).exp()

    (found,) = torch.autograd.grad(recomputed(cached, x, keep_all()).sum(), x)
    (expected,) = torch.autograd.grad(cached(x).sum(), x)
    assert torch.equal(found, expected)


def test_settings_that_cannot_be_used_are_refused(tiny_llama, prompt_rows, tmp_path):
    with pytest.raises(ConfigError, match="offload goes with memory: low or balanced"):
        TrainConfig(out=tmp_path, offload=True)
    if not torch.cuda.is_available():
        data = DataConfig(train=str(prompt_rows))
        config = TrainConfig(
            out=tmp_path / "x", model=str(tiny_llama), memory="low", offload=True, data=data
        )
        with pytest.raises(ConfigError, match="offload: moves activations from a GPU"):
            train(config)


def test_a_model_without_blocks_has_only_one_setting():
    model = build("llama")
    model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match="memory: low recomputes blocks, and LlamaForCausalLM"):
        check_memory(model, settings("low"))
    check_memory(model, settings("fast"))
