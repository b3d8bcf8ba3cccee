"""What ended in a traceback: routers and kernels among the targets, and merges of any model."""

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations

import lorakit as lk
from covering import sampled
from lorakit.attachment.attach import adapter_parameters
from lorakit.errors import MergeError, TargetError
from tiny_models import build

TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
VISION: dict[str, Any] = {**TEXT, "image_size": 8, "patch_size": 4}
VISION.pop("vocab_size")
GPT: dict[str, Any] = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1}
GPT |= {"eos_token_id": 2}
DECODER = {
    **TEXT,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WHISPER: dict[str, Any] = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}
WAVE: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(**WHISPER)
    return transformers.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    config = transformers.CLIPConfig(
        text_config={**TEXT, **IDS, "max_position_embeddings": 20},
        vision_config=VISION,
        projection_dim=8,
    )
    return transformers.CLIPModel(config)


def wave() -> nn.Module:
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**WAVE))


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    return transformers.ConvNextForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


def blip() -> nn.Module:
    text = {**TEXT, **IDS, "encoder_hidden_size": 16, "projection_dim": 8, "sep_token_id": 2}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION, projection_dim=8)
    return transformers.BlipForConditionalGeneration(config)


def vision_to_text() -> nn.Module:
    encoder = transformers.ViTModel(transformers.ViTConfig(**VISION))
    config = transformers.GPT2Config(**GPT, n_positions=32, add_cross_attention=True)
    config.is_decoder = True
    decoder = transformers.GPT2LMHeadModel(config)
    return transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)


def short() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT, n_positions=8))


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, "default"):
            parameter.add_(0.3 * torch.randn(parameter.shape))


@sampled(
    ("make", "target"),
    [
        (whisper, "q_proj"),
        (clip, "q_proj"),
        (wave, "q_proj"),
        (convnext, "pwconv1"),
        (resnet, "convolution"),
        (blip, "qkv"),
        (vision_to_text, "c_attn"),
        (short, "q"),
        (lambda: build("t5"), "q"),
        (lambda: build("vit"), "q"),
        (lambda: build("roberta", max_position_embeddings=12), "q"),
    ],
    share=2,
)
def test_merge_finds_a_batch_that_the_model_takes(make, target: str) -> None:
    """The logits of the unmerged and of the merged model are compared, whatever it takes."""
    torch.manual_seed(0)
    model = make().eval()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    lk.attach(model, lk.LoRAConfig(rank=2, targets=(target,)))
    randomize(model)
    report = lk.merge(model)
    assert report.logit_change is not None
    assert report.logit_change < 1e-3
    lk.detach(model)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def test_a_module_that_takes_no_known_batch_is_merged_without() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("0",)))
    assert lk.merge(model).logit_change is None


def test_a_probe_that_the_model_does_not_take_is_named_before_the_merge() -> None:
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("q",)))
    with pytest.raises(MergeError, match=r"does not take the probe \(pixels\)"):
        lk.merge(model, probe={"pixels": torch.zeros(1, 3)})
    lk.merge(model)


@pytest.mark.parametrize("family", ["Llama4", "Phimoe"])
def test_all_linear_leaves_routers_out_and_by_name_they_are_refused(family: str) -> None:
    extra = {"head_dim": 8, "intermediate_size_mlp": 16} if family == "Llama4" else {}
    name = "Llama4TextConfig" if family == "Llama4" else f"{family}Config"
    config = getattr(transformers, name)(**DECODER, **extra)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    found = lk.attach(model, lk.LoRAConfig(rank=2, targets=("all-linear",)))
    assert any(site.path.endswith("q_proj") for site in found.sites)
    assert not any(site.path.endswith("router") for site in found.sites)
    randomize(model)
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()
    lk.detach(model)
    with pytest.raises(TargetError, match=r"router is a \w+Router: it returns \d values"):
        lk.attach(model, lk.LoRAConfig(rank=2, targets=("router",)))


class NoKernel(nn.Linear):
    """A layer whose kernel is not installed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nothing."""
        raise ImportError("the kernel is not here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_layer_without_its_kernel_is_named(dtype: torch.dtype) -> None:
    model = build("llama")
    layer = NoKernel(32, 32, bias=False)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    model.model.layers[0].self_attn.q_proj = layer
    words = "NoKernel: its forward pass fails here: ImportError: the kernel is not here"
    for target in ("q", "all-linear"):
        with pytest.raises(TargetError, match=words):
            lk.attach(model, lk.LoRAConfig(rank=2, targets=(target,)))
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("v",)))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_a_weight_that_is_computed_cannot_be_merged_into(kind: str, old: bool) -> None:
    wrap = getattr(nn.utils if old else parametrizations, kind)
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 8)
    base = model(x)
    lk.attach(model, lk.LoRAConfig(rank=2, targets=("0", "1")))
    randomize(model)
    adapted = model(x)
    assert (adapted - base).abs().max() > 1e-3
    with pytest.raises(MergeError, match="the weight is computed in each forward pass"):
        lk.merge(model)
    assert torch.equal(model(x), adapted)
    lk.detach(model)
    assert torch.equal(model(x), base)


class Traced(nn.Module):
    """A model's logits as a function of token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, vocabulary)."""
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("grad", [False, True])
def test_a_model_with_an_adapter_is_traced(grad: bool) -> None:
    model = Traced(build("llama"))
    lk.attach(model.model, lk.LoRAConfig(rank=2, targets=("q", "down", "embed")))
    randomize(model.model)
    ids = torch.arange(3, 12)[None]
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        torch.testing.assert_close(traced(ids + 5), model(ids + 5), rtol=0, atol=1e-5)
