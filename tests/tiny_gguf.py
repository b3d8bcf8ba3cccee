"""GGUF files small enough for tests."""

from pathlib import Path

import gguf
from transformers import PreTrainedModel

from tiny_models import VOCABULARY


def write_gguf(
    file: Path, model: PreTrainedModel, *, split: str = "smollm", kind: str = "llama"
) -> None:
    """Write a tiny Llama with a byte-level tokenizer as a GGUF file.

    Args:
        file: a new one.
        model: what is written.
        split: how the tokenizer is said to divide texts into words.
        kind: the architecture that the file names.
    """
    config = model.config
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*"abcdefghij0123456789", "Ġ", "ĠĠ", "ĠĠĠ"]
    tokens = special + letters
    tokens += [f"unused{number}" for number in range(VOCABULARY - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (VOCABULARY - len(special)))
    # Two: of a list with one entry transformers 5.17 reads that entry in place of the list.
    writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            written = table.get_name(name, (".weight",))
            assert written is not None, name
            writer.add_tensor(written, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
