"""Tiny bases whose weights follow from a formula: the same bits on every machine."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

WORDS = ("red", "green", "blue", "big", "small", "old", "new", "cat", "dog", "bird", "fish")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
TOKENS = (*SPECIAL, *WORDS, "yes", "no", "\n")
VOCABULARY = 24
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BLOCKS: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def build(family: str) -> Any:
    """A base in eval mode: a llama with grouped heads, a gpt2, or a bert that classifies."""
    if family == "llama":
        llama = transformers.LlamaConfig(
            **_BLOCKS, num_key_value_heads=2, tie_word_embeddings=False
        )
        model: Any = transformers.LlamaForCausalLM(llama)
    elif family == "gpt2":
        gpt2 = transformers.GPT2Config(
            **_SHARED, n_embd=16, n_layer=2, n_head=4, n_positions=32, n_inner=24
        )
        model = transformers.GPT2LMHeadModel(gpt2)
    else:
        bert = transformers.BertConfig(**_BLOCKS, type_vocab_size=2)
        bert.num_labels = 3
        model = transformers.BertForSequenceClassification(bert)
    fill(model.named_parameters(), seed="base")
    return model.eval()


def fill(parameters, *, seed: str, std: float = 0.3, add: bool = False) -> None:
    """Give parameters pseudorandom values by their names; with `add`, move them by such values.

    Norms are near 1. Python's generator gives the same floats on every machine; torch's normal
    numbers depend on the processor's instructions.
    """
    with torch.no_grad():
        for name, parameter in parameters:
            draw = random.Random(f"{seed} {name}")
            values = [draw.uniform(-2 * std, 2 * std) for _ in range(parameter.numel())]
            noise = torch.tensor(values).view(parameter.shape)
            is_norm = parameter.dim() == 1 and name.endswith("weight")
            start = parameter if add else float(is_norm)
            parameter.copy_(start + noise)


def inputs() -> dict[str, Tensor]:
    """Two rows of token ids; the second ends in padding."""
    draw = random.Random("inputs")
    ids = torch.tensor([[draw.randrange(4, VOCABULARY) for _ in range(6)] for _ in range(2)])
    mask = torch.ones_like(ids)
    ids[1, 4:] = mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, *, recorded: bool = False) -> Tensor:
    """A model's logits for the fixed rows, of a forward pass recorded by autograd or not."""
    with torch.set_grad_enabled(recorded):
        return model(**inputs()).logits.detach().contiguous()


def arithmetic() -> str:
    """A fingerprint of this machine's floating-point results: a base's gradients, hashed.

    Where it is the same, so are the bits of a training run; elsewhere they differ by rounding.
    """
    model, digest = build("llama"), hashlib.sha256(torch.__version__.encode())
    batch = inputs()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for _, parameter in model.named_parameters():
        digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()


def save(family: str, folder: Path) -> None:
    """Write a base and its tokenizer as a folder; a bert is written without its classifier."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = build(family)
    (model.bert if family == "bert" else model).save_pretrained(folder)
    vocabulary = {word: number for number, word in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    ).save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write 16 rows of each kind: prompts with the same words backwards, and texts with a label."""
    draw = random.Random("rows")
    texts = [draw.choices(WORDS, k=draw.randrange(2, 5)) for _ in range(16)]
    prompts = [{"prompt": " ".join(t), "completion": " ".join(t[::-1])} for t in texts]
    labels = [{"text": " ".join(t), "label": "yes" if "cat" in t else "no"} for t in texts]
    for name, rows in (("prompts", prompts), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
