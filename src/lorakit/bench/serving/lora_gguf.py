"""Adapters on a Llama as GGUF files, which llama.cpp reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.tensor_files import WEIGHTS_FILE
from lorakit.errors import MissingExtraError

LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of a Llama's linear layers."""
_NAME = re.compile(r"layers\.(\d+)\.(\w+\.\w+)\.lora_([AB])\.weight$")


def write_lora_gguf(folder: Path, config: Any, file: Path) -> Path:
    """Write an adapter of the linear layers of a Llama for llama.cpp.

    Args:
        folder: of the adapter, in PEFT's file format.
        config: of the model.
        file: where to write it.

    Raises:
        MissingExtraError: the library gguf is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise MissingExtraError("writing GGUF files", "gguf") from None
    settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    writer = GGUFWriter(file, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(settings["lora_alpha"]))
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        found = _NAME.search(name)
        assert found is not None, name
        layer = LAYERS[found[2]]
        if found[3] == "B" and layer in ("attn_q", "attn_k"):
            heads = config.num_attention_heads
            tensor = _permuted(tensor, heads if layer == "attn_q" else config.num_key_value_heads)
        writer.add_tensor(
            f"blk.{found[1]}.{layer}.weight.lora_{found[3].lower()}",
            tensor.float().contiguous().numpy(),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _permuted(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key in llama.cpp's order: both halves of a head's rotation in turn."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
