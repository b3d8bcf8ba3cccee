"""EVA: A starts as the right singular vectors of what the layer reads, found here by one SVD."""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import lorakit as lk
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AttachError, ConfigError, TargetError
from references import attach_random, outputs, randomise
from tiny_models import build, example_inputs

TARGETS = {
    "llama": ("all-linear",),
    "gpt2": ("q", "v", "down"),
    "opt": ("q", "v", "mlp"),
    "bert": ("q", "k", "v", "up"),
}


def batches(model, count=3):
    """Batches with padding, which must not count."""
    found = []
    for seed in range(count):
        batch = example_inputs(model, rows=3, seed=seed)
        batch["attention_mask"] = batch["attention_mask"].clone()
        batch["attention_mask"][0, 4:] = 0
        batch["attention_mask"][1, :2] = 0
        found.append(batch)
    return found


def inputs_of(model, data):
    """All tokens that each linear layer reads, (tokens, d_in), without padding."""
    read: dict[str, Any] = {}

    def note(path):
        def hook(layer, args):
            tokens = args[0].reshape(-1, args[0].shape[-1])
            read.setdefault(path, []).append(tokens[batch["attention_mask"].reshape(-1).bool()])

        return hook

    hooks = [
        module.register_forward_pre_hook(note(path))
        for path, module in model.named_modules()
        if path.startswith(("model.layers", "model.decoder", "transformer.h", "bert.encoder"))
        and type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(parts) for path, parts in read.items()}


@pytest.mark.parametrize("family", TARGETS)
def test_a_holds_the_main_directions_and_the_model_answers_as_before(family):
    model = build(family).double()
    data = batches(model)
    read = inputs_of(model, data)
    before = outputs(model, data[0])
    config = lk.LoRAConfig(targets=TARGETS[family], rank=3, init="eva", modules_to_save=())
    lk.attach(model, config, data=iter(data))
    assert torch.equal(outputs(model, data[0]), before)
    adapter = lk.extract(model)
    for site in adapter.sites:
        a = adapter.tensors[f"{site.name}.lora_a"].double()
        x = read[site.path]
        expected = torch.linalg.svd(x, full_matrices=False)[2][: site.rank]
        signs = (a * expected).sum(1, keepdim=True).sign()
        torch.testing.assert_close(a, signs * expected, rtol=0, atol=1e-5)
        assert not adapter.tensors[f"{site.name}.lora_b"].any()


def test_layers_that_read_the_same_start_from_the_same():
    model = build("llama")
    config = lk.LoRAConfig(targets=("q", "k", "v", "gate", "up"), rank=3, init="eva")
    lk.attach(model, config, data=batches(model))
    tensors = lk.extract(model).tensors
    block = "model.layers.1."
    q, k, v = (tensors[f"{block}self_attn.{x}_proj.lora_a"] for x in "qkv")
    gate, up = (tensors[f"{block}mlp.{x}_proj.lora_a"] for x in ("gate", "up"))
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert torch.equal(gate, up)
    assert not torch.equal(q, gate)


def test_layers_that_read_the_same_train_each_their_own():
    model = build("llama")
    config = lk.LoRAConfig(targets=("q", "v", "gate", "up"), rank=3, init="eva")
    lk.attach(model, config, data=batches(model))
    tensors = [p for name, p in adapter_parameters(model, "default") if name.endswith("lora_a")]
    assert len({p.untyped_storage().data_ptr() for p in tensors}) == len(tensors)
    # Nor does a parameter hold on to all vectors, of which it needs the first.
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in tensors)


def test_cross_attention_reads_two_inputs():
    model = build("t5")
    data = [example_inputs(model, seed=seed) for seed in range(3)]
    read: dict[str, Any] = {}

    def note(path):
        return lambda layer, args: read.setdefault(path, []).append(args[0].flatten(0, 1))

    block = "decoder.block.1.layer.1.EncDecAttention."
    hooks = [
        model.get_submodule(block + x).register_forward_pre_hook(note(block + x)) for x in "qkv"
    ]
    with torch.no_grad():
        for batch in data:
            model(**batch)
    for hook in hooks:
        hook.remove()
    lk.attach(model, lk.LoRAConfig(targets=("q", "k", "v"), rank=2, init="eva"), data=data)
    tensors = lk.extract(model).tensors
    for x in "qkv":
        expected = torch.linalg.svd(torch.cat(read[block + x]))[2][:2]
        a = tensors[f"{block}{x}.lora_a"]
        torch.testing.assert_close((a * expected).sum(1).abs(), torch.ones(2), atol=1e-3, rtol=0)


def test_it_looks_at_the_base_in_eval_mode_and_leaves_no_trace():
    model = build("bert", hidden_dropout_prob=0.5).train()
    config = lk.LoRAConfig(rank=3, init="eva", modules_to_save=())
    lk.attach(model, config, data=batches(model), name="first")
    first = lk.extract(model, "first").tensors
    attach_random(model, "noise", targets=("q", "v", "up"), modules_to_save=())
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    labelled = [{**batch, "labels": torch.tensor([0, 1, 2])} for batch in batches(model)]
    lk.attach(model, config, data=labelled, name="second")
    for name, tensor in lk.extract(model, "second").tensors.items():
        assert torch.equal(tensor, first[name])
    assert model.training
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks


def test_half_precision_is_summed_in_float32():
    model = build("llama")
    expected = lk.LoRAConfig(rank=1, init="eva")
    lk.attach(model, expected, data=batches(model))
    half = build("llama").bfloat16()
    lk.attach(half, expected, data=batches(half))
    for name, tensor in lk.extract(half).tensors.items():
        if name.endswith("lora_a"):
            near = (tensor * lk.extract(model).tensors[name]).sum().abs().item()
            assert near > 0.99
            assert tensor.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_file_of_it_is_plain_lora(tmp_path):
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=3, init="eva"), data=batches(model))
    adapter = lk.extract(model)
    loaded = lk.Adapter.load(adapter.save(tmp_path / "a"))
    lk.detach(model)
    # Its settings say eva, and no data is needed any more.
    lk.attach(model, loaded)
    assert loaded.content_hash() == adapter.content_hash()


# PEFT asks transformers by a name that 5.23 has replaced.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_move_to_where_they_explain_most(tmp_path, use_rslora):
    model = build("llama").double()
    data = batches(model)
    read, before = inputs_of(model, data), outputs(model, data[0])
    config = lk.LoRAConfig(targets=("q", "v", "down"), rank=4, alpha=6, use_rslora=use_rslora)
    still = lk.attach(model, config).sites
    lk.detach(model)
    moving = config.model_copy(update={"init": "eva", "eva_rho": 2.5})
    found = lk.attach(model, moving, data=data)
    assert torch.equal(outputs(model, data[0]), before)
    ranks = [site.rank for site in found.sites]
    assert sum(ranks) == 4 * len(ranks)
    assert min(ranks) >= 1
    assert 4 < max(ranks) <= 10
    assert [site.scale for site in found.sites] == [site.scale for site in still]
    for site in found.sites:
        expected = site.alpha / (site.rank**0.5 if use_rslora else site.rank)
        assert expected == pytest.approx(site.scale, rel=1e-12)
    # A direction that was left out explains no more than the least of those that were taken.
    shares = {p: torch.linalg.svdvals(x).square() for p, x in read.items()}
    shares = {p: values / values.sum() for p, values in shares.items()}
    taken = [shares[s.path][s.rank - 1].item() for s in found.sites if s.rank > 1]
    left = [shares[s.path][s.rank].item() for s in found.sites if s.rank < 10]
    assert min(taken) >= max(left) - 1e-9
    assert found.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    randomise(model)
    after, saved = outputs(model, data[0]), lk.extract(model).save(tmp_path / "moved")
    lk.detach(model)
    lk.attach(model, lk.Adapter.load(saved))
    assert torch.equal(outputs(model, data[0]), after)
    lk.detach(model)
    theirs = peft.PeftModel.from_pretrained(model, str(saved)).double()
    torch.testing.assert_close(outputs(theirs, data[0]), after)


class Unused(nn.Module):
    """A model that calls one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.table = nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(5, 4)

    def forward(self, x):
        return self.used(x)


def test_what_cannot_be_is_told():
    config = {"rank": 2, "init": "eva"}
    data = [{"x": torch.randn(3, 4)}]

    def refusal(error, targets=("used",), *, data=data, **changes):
        with pytest.raises(error) as caught:
            lk.attach(Unused(), lk.LoRAConfig(targets=targets, **config | changes), data=data)
        return str(caught.value)

    assert "give batches, as in lk.attach(model, config, data=" in refusal(AttachError, data=None)
    assert "there is no batch in it" in refusal(AttachError, data=[])
    assert "data is given, but nothing looks at it" in refusal(AttachError, init="kaiming")
    assert "have read nothing (1 problem):\n  idle" in refusal(TargetError, ("used", "idle"))
    assert "init eva is for linear layers alone" in refusal(TargetError, ("used", "table"))
    assert "has rank 5, and there are 4 singular vectors" in refusal(TargetError, rank=5)
    with pytest.raises(ConfigError, match="eva_rho moves ranks in init eva, and init is kaiming"):
        lk.LoRAConfig(eva_rho=2.0)
