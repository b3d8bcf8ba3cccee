"""Weights that a model reads without calling their layer: the adapter is in what is read."""

import pytest
import torch
import transformers as hf
from torch import nn

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import AttachError, RouteError, TargetError
from references import base_hash, randomise
from tiny_models import STACKS, build, example_inputs

IDS = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
MAMBA = {"vocab_size": 60, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
HYBRID = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def mamba(kind="Mamba"):
    config = getattr(hf, f"{kind}Config")(**MAMBA, time_step_rank=4, initializer_range=0.5)
    return getattr(hf, f"{kind}ForCausalLM")(config)


def mamba2():
    config = hf.Mamba2Config(
        **MAMBA, num_heads=4, head_dim=8, n_groups=2, chunk_size=4, initializer_range=0.5
    )
    return hf.Mamba2ForCausalLM(config)


def jamba():
    config = hf.JambaConfig(
        **HYBRID,
        num_hidden_layers=2,
        num_experts=2,
        mamba_d_state=4,
        mamba_d_conv=3,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        initializer_range=0.3,
    )
    return hf.JambaForCausalLM(config)


def falcon_h1():
    config = hf.FalconH1Config(
        **HYBRID,
        num_hidden_layers=1,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=4,
        initializer_range=0.3,
    )
    return hf.FalconH1ForCausalLM(config)


def lfm2():
    config = hf.Lfm2Config(
        **HYBRID, num_hidden_layers=2, layer_types=["conv", "full_attention"], initializer_range=0.3
    )
    return hf.Lfm2ForCausalLM(config)


def qwen3_next():
    config = hf.Qwen3NextConfig(
        **HYBRID,
        num_hidden_layers=2,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        initializer_range=0.3,
    )
    return hf.Qwen3NextForCausalLM(config)


def wavlm():
    config = hf.WavLMConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
    )
    return hf.WavLMForCTC(config)


class TorchEncoder(nn.Module):
    """torch's own encoder, which hands its weights to one operation in eval mode."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(60, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids):
        return self.head(self.encoder(self.embed(input_ids)))


CASES = {
    "mamba_dt_proj": (mamba, "dt_proj"),
    "mamba_conv1d": (mamba, "conv1d"),
    "mamba_all_linear": (mamba, "all-linear"),
    "falcon_mamba": (lambda: mamba("FalconMamba"), "dt_proj"),
    "mamba2": (mamba2, "conv1d"),
    "jamba": (jamba, "dt_proj"),
    "falcon_h1": (falcon_h1, "conv1d"),
    "lfm2": (lfm2, "conv.conv"),
    "qwen3_next": (qwen3_next, "conv1d"),
    "wavlm_q": (wavlm, "q_proj"),
    "wavlm_out": (wavlm, "out_proj"),
    "torch_encoder": (TorchEncoder, "linear1"),
    "torch_encoder_second": (TorchEncoder, "linear2"),
}


def made(maker):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return maker().eval()


def inputs_of(model):
    if isinstance(model, hf.WavLMForCTC):
        return {"input_values": torch.randn(2, 200, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": IDS}


def logits(model, **inputs):
    with torch.no_grad():
        found = model(**(inputs or inputs_of(model)))
    return found if isinstance(found, torch.Tensor) else found.logits


@sampled("case", list(CASES), share=2)
def test_the_adapter_acts_where_the_weight_is_read(case):
    maker, target = CASES[case]
    model = made(maker)
    before, base = base_hash(model), logits(model)
    config = lk.LoRAConfig(rank=2, alpha=8, targets=(target,), modules_to_save=())
    lk.attach(model, config)
    torch.testing.assert_close(logits(model), base)
    randomise(model, std=0.3)
    want = logits(model)
    effect = (want - base).abs().max()
    assert effect > 1e-5
    lk.merge(model, probe=inputs_of(model))
    assert (logits(model) - want).abs().max() < 0.02 * effect
    lk.unmerge(model)
    torch.testing.assert_close(logits(model), want)
    found = model(**inputs_of(model))
    (found if isinstance(found, torch.Tensor) else found.logits).sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapter_parameters(model, "default"))
    lk.detach(model)
    assert base_hash(model) == before
    torch.testing.assert_close(logits(model), base)


@pytest.mark.parametrize("case", ["mamba_conv1d", "mamba_dt_proj", "mamba2", "lfm2"])
def test_generation_with_a_cache_has_the_adapter_too(case):
    maker, target = CASES[case]
    model = made(maker)
    lk.attach(model, lk.LoRAConfig(rank=2, alpha=8, targets=(target,)))
    randomise(model, std=0.3)
    settings = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    with_cache = model.generate(IDS, use_cache=True, **settings)
    without = model.generate(IDS, use_cache=False, **settings)
    for ours, theirs in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_gradients_are_those_of_the_merged_weight():
    model = made(wavlm)
    lk.attach(model, lk.LoRAConfig(rank=2, alpha=8, targets=("q_proj",), modules_to_save=()))
    randomise(model, std=0.3)
    model(**inputs_of(model)).logits.square().sum().backward()
    trained = dict(adapter_parameters(model, "default"))
    plain = made(wavlm)
    own = dict(plain.named_parameters())
    factors = {name: p.detach().requires_grad_() for name, p in trained.items()}
    for number in range(2):
        path = f"wavlm.encoder.layers.{number}.attention.q_proj"
        a, b = (factors[f"{path}.lora_{end}"] for end in "ab")
        own[f"{path}.weight"] = own[f"{path}.weight"] + 4 * b @ a
    answer = torch.func.functional_call(plain, own, kwargs=inputs_of(plain), args=())
    answer.logits.square().sum().backward()
    for name, factor in factors.items():
        torch.testing.assert_close(trained[name].grad, factor.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapted_projection_that_is_read_equals_the_merged_one(use_dora):
    model = made(wavlm)
    config = lk.LoRAConfig(
        rank=2, alpha=8, targets=("k_proj", "v_proj"), modules_to_save=(), use_dora=use_dora
    )
    lk.attach(model, config)
    randomise(model, std=0.3)
    want = logits(model)
    assert lk.merge(model, probe=inputs_of(model)).logit_change < 1e-3
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)


def test_adapters_of_a_read_weight_are_for_all_rows():
    model = made(mamba)
    for name in ("a", "b"):
        lk.attach(model, lk.LoRAConfig(rank=2, targets=("dt_proj",)), name=name)
        randomise(model, name, std=0.3, seed=ord(name))
    refused = pytest.raises(RouteError, match="a weight that the model reads by itself")
    with refused, lk.route(model, ["a", "b"]):
        pass
    with lk.route(model, {"a": 0.5, "b": 0.25}):
        mixed = logits(model)
    weights = {name: lk.extract(model, name) for name in ("a", "b")}
    lk.detach(model)
    for path, layer in model.named_modules():
        for name, factor in (("a", 0.5), ("b", 0.25)):
            if path.endswith("dt_proj"):
                a, b = (weights[name].tensors[f"{path}.lora_{end}"] for end in "ab")
                layer.weight.data += factor * weights[name].sites[0].scale * b @ a
    torch.testing.assert_close(mixed, logits(model))


def test_dropout_in_a_weight_that_is_read_is_refused():
    model = made(mamba)
    with pytest.raises(TargetError, match="set dropout to 0, or exclude them"):
        lk.attach(model, lk.LoRAConfig(rank=2, targets=("all-linear",), dropout=0.1))
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("in_proj",), dropout=0.1))


BART_STACKS = {
    **STACKS,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 60,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
SHARED = {
    "Bart": ("BartForConditionalGeneration", BART_STACKS),
    "MBart": ("MBartForConditionalGeneration", BART_STACKS),
    "M2M100": ("M2M100ForConditionalGeneration", BART_STACKS),
    "Marian": ("MarianMTModel", BART_STACKS),
    "T5": ("T5ForConditionalGeneration", T5),
    "MT5": ("MT5ForConditionalGeneration", T5),
    "UMT5": ("UMT5ForConditionalGeneration", T5),
}


@sampled("kind", list(SHARED), share=2)
def test_the_embedding_is_the_one_that_is_called(kind):
    name, settings = SHARED[kind]
    model = made(lambda: getattr(hf, name)(getattr(hf, f"{kind}Config")(**settings)))
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    base = logits(model, **inputs)
    found = lk.attach(model, lk.LoRAConfig(rank=2, targets=("embed",)))
    assert {site.path.rpartition(".")[2] for site in found.sites} == {"embed_tokens"}
    randomise(model, std=0.5)
    want = logits(model, **inputs)
    assert not torch.allclose(want, base, atol=1e-5)
    lk.merge(model)
    torch.testing.assert_close(logits(model, **inputs), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        lk.LoRAConfig(rank=2, targets=("model.shared",)),
        lk.LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("shared",)),
    ],
)
def test_an_embedding_that_is_never_called_is_refused(config):
    model = made(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART_STACKS)))
    with pytest.raises(TargetError, match=r"model.shared  is never called: name model.encoder"):
        lk.attach(model, config)


class Hidden(nn.Module):
    """A model that reads a weight where no look at its code can tell."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.read = nn.Linear(16, 16)
        self.called = nn.Linear(16, 16)
        self.skipped = nn.Linear(16, 16)
        self.way = "read"

    def forward(self, input_ids, skip=True):
        x = self.called(self.embed(input_ids))
        x = x @ getattr(self, self.way).weight.T
        return x if skip else self.skipped(x)


def test_a_weight_that_is_read_unseen_is_an_error_at_the_first_call():
    model = made(Hidden)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("called", "read")))
    for _ in range(2):
        with pytest.raises(AttachError, match=r"does nothing in some layers.*\n  read$"):
            model(IDS)
    model.train()
    with pytest.raises(AttachError, match="without calling them"):
        model(IDS)
    lk.switch(model, None)
    model(IDS)
    lk.detach(model)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("called",)))
    model(IDS)


def test_a_branch_that_was_skipped_is_no_error():
    model = made(Hidden)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("called", "skipped")))
    calls = []
    model.called.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        model(IDS)
    # The first call is looked at once more.
    assert len(calls) == 5
    model(IDS, skip=False)


def test_a_call_that_comes_to_every_layer_is_not_repeated():
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q", "v")))
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model(**example_inputs(model))
    assert len(calls) == 1


def test_bias_and_norm_of_torchs_encoder_are_trained_where_they_are_read():
    model = made(TorchEncoder)
    base = logits(model)
    lk.attach(model, lk.BitFitConfig())
    randomise(model, std=0.5)
    fast = logits(model)
    model.train()
    torch.testing.assert_close(fast, logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(fast, base, atol=1e-3)
