"""A small Llama with random weights and SmolLM2's tokens, for runs of many requests.

python benchmarks/small_llama.py [FOLDER]      (out/small; a few seconds)
lorakit bench soak --model out/small --out benchmarks/results/soak_small.json

A server on it does in minutes what takes hours on a trained one: what its weights are does not
matter to whether an answer is that of the weights it names.
"""

import sys
from pathlib import Path

import torch
import transformers

import lorakit as lk


def make(folder: Path) -> None:
    """Write the model and its tokenizer."""
    _, tokenizer = lk.load_model("smollm2")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1] if len(sys.argv) > 1 else "out/small"))
