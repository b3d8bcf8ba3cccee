"""Tiny random models of many families, each with a tokenizer of a few dozen words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorakit.models.image_processor import ImageProcessor
from lorakit.models.load import load_model

Kind = Literal["decoder", "encoder-decoder", "classifier", "images"]
"""What a model does: continue texts, answer them, classify texts, or classify images."""

WORDS = tuple(f"w{number}" for number in range(60))
"""The vocabulary beside the special tokens."""
CLASSES = ("first", "second", "third")
LENGTH = 7
"""Tokens of a row."""
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

_SIZES: dict[str, Any] = {
    "vocab_size": len(_SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_GPT = {"n_positions": 64, "n_ctx": 64}
_RELATIVE = {
    "relative_attention": True,
    "max_relative_positions": 8,
    "pos_att_type": ["p2c", "c2p"],
}
_EXPERTS = {
    **_GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_IMAGES = {"image_size": 8, "patch_size": 4}
_LATENT = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}

_DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3"),
            *("phi3", "granite", "cohere2", "olmo2", "stablelm", "starcoder2", "glm4", "nemotron"),
        ),
        _GROUPED,
    ),
    "phi": {},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {},
    "gptj": {**_GPT, "rotary_dim": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"ffn_hidden_size": 48},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _EXPERTS),
    "deepseek_v3": _LATENT,
    "llama4_text": {**_EXPERTS, "intermediate_size_mlp": 24},
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_STACKS = {
    "d_model": 32,
    **{
        f"{stack}_{size}": value
        for stack in ("encoder", "decoder")
        for size, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    },
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "pegasus", "m2m_100", "marian"), _STACKS),
    "switch_transformers": {
        **_T5,
        "router_jitter_noise": 0.0,
        "num_experts": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
    },
    "nllb-moe": {
        **_STACKS,
        "num_experts": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
}
_CLASSIFIERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {},
    "xlm-roberta": {},
    "mpnet": {},
    "modernbert": {},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}
_OF_IMAGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vit", "dinov2", "beit"), _IMAGES),
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
}
_BY_KIND: Mapping[Kind, dict[str, dict[str, Any]]] = {
    "decoder": _DECODERS,
    "encoder-decoder": _ENCODER_DECODERS,
    "classifier": _CLASSIFIERS,
    "images": _OF_IMAGES,
}
_KINDS: dict[str, Kind] = {name: kind for kind, names in _BY_KIND.items() for name in names}

FAMILIES: tuple[str, ...] = tuple(_KINDS)
"""transformers' model types."""
REAL: Mapping[str, Kind] = {"smollm2": "decoder", "minilm": "classifier"}
"""The packaged models."""


@dataclass(frozen=True, kw_only=True)
class TriedBase:
    """A base model of one family, and what it takes."""

    name: str
    kind: Kind
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """For images, their processor."""

    @property
    def task(self) -> str:
        """What `lorakit train` calls what it does."""
        words = {"classifier": "classification", "images": "image-classification"}
        return words.get(self.kind, "generation")

    def inputs(self, rows: int) -> dict[str, Tensor]:
        """A batch of rows of equal lengths, the same each time."""
        generator = torch.Generator().manual_seed(0)
        config = self.model.config
        if self.kind == "images":
            size = config.image_size
            pixels = torch.randn(rows, config.num_channels, size, size, generator=generator)
            return {"pixel_values": pixels}
        shape = (rows, LENGTH)
        ids = torch.randint(len(_SPECIAL), _SIZES["vocab_size"], shape, generator=generator)
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**found, "decoder_input_ids": ids} if self.is_encoder_decoder else found

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a row is two sequences: what is read, and what is written."""
        return self.kind == "encoder-decoder"


def is_known(name: str) -> bool:
    """Whether there is a base of a name: a family, a packaged model, or a decoder's place."""
    return name in (*FAMILIES, *REAL) or Path(name).exists()


def base_of(name: str) -> TriedBase:
    """A base by the name of its family, or of a packaged model, or a decoder by its place; in eval
    mode.

    Raises:
        KeyError: there is no recipe for it.
        ModelError: the model at that place cannot be read.
    """
    if name not in FAMILIES:
        kind = "decoder" if Path(name).exists() else REAL[name]
        how: dict[str, Any] = {"labels": CLASSES, "task": "classification"}
        torch.manual_seed(0)
        model, tokenizer = load_model(name, **(how if kind == "classifier" else {}))
        # As in the tiny ones: passes are compared with each other.
        for dropout in model.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
        return TriedBase(name=Path(name).stem, kind=kind, model=model, tokenizer=tokenizer)
    kind = _KINDS[name]
    model = _tiny(name, kind)
    processor = _tokenizer() if kind != "images" else _image_processor(model.config.image_size)
    return TriedBase(name=name, kind=kind, model=model, tokenizer=processor)


_AUTO: Mapping[Kind, Any] = {
    "decoder": transformers.AutoModelForCausalLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    "classifier": transformers.AutoModelForSequenceClassification,
    "images": transformers.AutoModelForImageClassification,
}


def _tiny(name: str, kind: Kind) -> PreTrainedModel:
    """A random model of two blocks and width 32, without dropout."""
    settings = {**_SIZES, **_BY_KIND[kind][name]}
    if kind in ("classifier", "images"):
        settings["num_labels"] = len(CLASSES)
        settings["id2label"] = dict(enumerate(CLASSES))
        settings["label2id"] = {label: number for number, label in enumerate(CLASSES)}
    config = transformers.AutoConfig.for_model(name, **settings)
    for setting in list(_dropouts(config)):
        setattr(config, setting, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = _AUTO[kind].from_config(config)
        for parameter in model.parameters():
            # Some start at zero, and are filled from a checkpoint.
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def _dropouts(config: Any) -> Iterator[str]:
    """The names of a config's probabilities of dropout."""
    for name, value in config.to_dict().items():
        is_dropout = "drop" in name or name.endswith("_pdrop")
        if is_dropout and isinstance(value, float):
            yield name


def _image_processor(size: int) -> PreTrainedTokenizerBase:
    # Imported late: it needs Pillow.
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ImageProcessor(ViTImageProcessorPil(size={"height": size, "width": size}))


def _tokenizer() -> PreTrainedTokenizerBase:
    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *WORDS))}
    tokens: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerBase = make(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )
    return made
