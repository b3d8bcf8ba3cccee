"""Adapters of PEFT here, and adapters made here in PEFT: every architecture, bit for bit."""

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from torch import Tensor, nn

import lorakit as lk
from covering import sampled
from lorakit.errors import AdapterFileError
from references import randomise
from tiny_models import STACKS

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (
        ".*is_gradient_checkpointing",
        "fan_in_fan_out is set to False but the target module is `Conv1D`",
        "Setting `save_embedding_layers` to `True`",
        "Could not identify embedding layer",
        "Model has `tie_word_embeddings=True`",
        "The following layers were not sharded",
    )
]

DRAWN = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 50, (2, 9), generator=DRAWN)
IMAGE = torch.randn(2, 3, 8, 8, generator=DRAWN)
LARGER_IMAGE = torch.randn(2, 3, 32, 32, generator=DRAWN)
SPECTROGRAM = torch.randn(2, 8, 20, generator=DRAWN)
WAVE = torch.randn(2, 200, generator=DRAWN)

WIDE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**WIDE, "intermediate_size": 24, "num_key_value_heads": 1, "pad_token_id": 0}
DECODER["initializer_range"] = 0.3
ENCODER = {**WIDE, "intermediate_size": 16, "initializer_range": 0.3}
EXPERTS = {**DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS["moe_intermediate_size"] = 8
VISION = {**ENCODER, "image_size": 8, "patch_size": 4}
VISION.pop("vocab_size")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GPT = {"vocab_size": 60, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
XLNET = {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 8,
}
SPEECH = {
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
CAUSAL, STACKED, CLASSES = "ForCausalLM", "ForConditionalGeneration", "ForImageClassification"

ARCHITECTURES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Llama": (CAUSAL, DECODER, ("q_proj", "down_proj")),
    "Qwen3Moe": (CAUSAL, EXPERTS, ("q_proj", "o_proj")),
    "Mixtral": (CAUSAL, DECODER | {"num_local_experts": 4}, ("q_proj", "v_proj")),
    "GptOss": (
        CAUSAL,
        DECODER | {"head_dim": 8, "num_local_experts": 4},
        ("q_proj", "v_proj"),
    ),
    "Gemma2": (CAUSAL, DECODER | {"head_dim": 8}, ("gate_proj", "lm_head")),
    "Gemma3": (CAUSAL, DECODER | {"head_dim": 8}, ("q_proj", "embed_tokens")),
    "Granite": (
        CAUSAL,
        DECODER | {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
        ("embed_tokens", "q_proj"),
    ),
    "Phi3": (CAUSAL, DECODER, ("qkv_proj", "gate_up_proj")),
    "Falcon": (CAUSAL, WIDE | {"initializer_range": 0.3}, ("query_key_value", "dense")),
    "Bloom": (
        CAUSAL,
        {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        ("query_key_value", "word_embeddings"),
    ),
    "GPTBigCode": (CAUSAL, GPT, ("c_attn", "c_proj")),
    "Rwkv": (
        CAUSAL,
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24},
        ("key", "value", "receptance"),
    ),
    "Mamba": (
        CAUSAL,
        {"vocab_size": 60, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
        | {"time_step_rank": 4, "initializer_range": 0.3},
        ("in_proj", "x_proj", "embeddings"),
    ),
    "Lfm2": (
        CAUSAL,
        DECODER | {"layer_types": ["conv", "full_attention"]},
        ("in_proj", "q_proj"),
    ),
    "Qwen3Next": (CAUSAL, EXPERTS | LINEAR_ATTENTION, ("in_proj_qkvz", "shared_expert_gate")),
    "T5": (STACKED, T5 | {"decoder_start_token_id": 0}, ("q", "v", "wi", "wo")),
    "MBart": (STACKED, STACKS | SPECIAL | {"scale_embedding": True}, ("embed_tokens", "q_proj")),
    "Whisper": (
        STACKED,
        STACKS
        | SPECIAL
        | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12},
        ("q_proj", "v_proj", "proj_out"),
    ),
    "Llava": (STACKED, {}, ("q_proj", "linear_1")),
    "CLIP": ("Model", {}, ("q_proj", "patch_embedding", "token_embedding", "visual_projection")),
    "ViT": (CLASSES, VISION, ("projection", "fc1")),
    "ConvNext": (
        CLASSES,
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        ("pwconv1", "downsampling_layer.1"),
    ),
    "ResNet": (
        CLASSES,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        ("convolution",),
    ),
    "Wav2Vec2": ("ForCTC", ENCODER | SPEECH, ("q_proj", "conv_layers.0.conv")),
    "Albert": (
        "ForSequenceClassification",
        ENCODER | {"embedding_size": 8},
        ("query", "value", "ffn"),
    ),
    "Roberta": ("ForSequenceClassification", ENCODER | {"pad_token_id": 1}, ("query", "value")),
    "Bert": ("ForMaskedLM", ENCODER, ("query", "decoder")),
    "Esm": (
        "ForMaskedLM",
        ENCODER | {"pad_token_id": 1, "mask_token_id": 4, "max_position_embeddings": 40},
        ("query", "decoder"),
    ),
    "XLNet": ("LMHeadModel", XLNET, ("layer_1", "layer_2")),
}
"""The head, the settings and the adapted modules, by the name in transformers."""


def config_of(name: str, settings: dict[str, Any]) -> Any:
    if name == "Llava":
        vision = hf.CLIPVisionConfig(**VISION)
        return hf.LlavaConfig(
            text_config=hf.LlamaConfig(**DECODER), vision_config=vision, image_token_id=55
        )
    if name == "CLIP":
        text = ENCODER | {"max_position_embeddings": 20, "eos_token_id": 2}
        return hf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return getattr(hf, kind)(**settings)


def build(name: str) -> nn.Module:
    """A tiny model of an architecture, the same each time."""
    head, settings, _ = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = {"XLNet": "XLNetLMHeadModel", "CLIP": "CLIPModel"}.get(name, name + head)
        return getattr(hf, kind)(config_of(name, settings)).eval()


def inputs_of(name: str) -> dict[str, Tensor]:
    """A batch that it takes."""
    match name:
        case "ViT":
            return {"pixel_values": IMAGE}
        case "ConvNext" | "ResNet":
            return {"pixel_values": LARGER_IMAGE}
        case "CLIP":
            return {"pixel_values": IMAGE, "input_ids": IDS}
        case "Wav2Vec2":
            return {"input_values": WAVE}
        case "Whisper":
            return {"input_features": SPECTROGRAM, "decoder_input_ids": IDS}
        case "T5" | "MBart":
            return {"input_ids": IDS, "decoder_input_ids": IDS}
        case _:
            return {"input_ids": IDS}


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        found = model(**inputs_of(name))
    return found.logits_per_image if name == "CLIP" else found.logits


def in_peft(name: str) -> peft.PeftModel:
    """A model of PEFT's with a random adapter."""
    targets = list(ARCHITECTURES[name][2])
    model = peft.get_peft_model(
        build(name), peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    # torch multiplies an input that is not contiguous, as that of Mamba's x_proj, in another way by
    # a weight that takes gradients, and rounds otherwise.
    return model.requires_grad_(False).eval()


@sampled("name", list(ARCHITECTURES), share=10)
def test_an_adapter_of_peft_is_the_same_here_and_back_there(name: str, tmp_path: Path) -> None:
    theirs = in_peft(name)
    wanted = output(theirs, name)
    assert (wanted - output(build(name), name)).abs().max() > 1e-4
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = build(name)
    lk.attach(ours, lk.Adapter.load(tmp_path / "peft"))
    assert torch.equal(output(ours, name), wanted)
    again = lk.extract(ours).save(tmp_path / "again")
    back = peft.PeftModel.from_pretrained(build(name), str(again)).eval()
    assert torch.equal(output(back, name), wanted)


@sampled("name", list(ARCHITECTURES), share=10)
def test_an_adapter_made_here_is_the_same_in_peft(name: str, tmp_path: Path) -> None:
    ours = build(name)
    # T5's modules are called as the roles are, which would leave its cross attention out.
    targets = tuple(rf"re:(.*\.)?{word}" for word in ARCHITECTURES[name][2])
    lk.attach(ours, lk.LoRAConfig(rank=2, alpha=4, targets=targets), trainable=False)
    randomise(ours, std=0.3)
    wanted = output(ours, name)
    folder = lk.extract(ours).save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(build(name), str(folder)).eval()
    assert torch.equal(output(theirs, name), wanted)


def test_an_adapter_with_llava_s_older_names_is_attached(tmp_path: Path) -> None:
    theirs = in_peft("Llava")
    expected = output(theirs, "Llava")
    theirs.save_pretrained(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    older = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.model.")
        name = name.replace("language_model.", "language_model.model.", 1)
        older[f"base_model.model.{name}"] = tensor
    assert "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight" in older
    file.write_bytes(safetensors.torch.save(older))
    ours = build("Llava")
    lk.attach(ours, tmp_path / "a")
    torch.testing.assert_close(output(ours, "Llava"), expected, rtol=0, atol=1e-5)
    back = peft.PeftModel.from_pretrained(build("Llava"), lk.extract(ours).save(tmp_path / "b"))
    torch.testing.assert_close(output(back.eval(), "Llava"), expected, rtol=0, atol=1e-5)
    with pytest.raises(AdapterFileError, match="is not a module of this model"):
        lk.attach(build("ViT"), tmp_path / "a")
