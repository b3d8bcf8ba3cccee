"""An adapter as one GGUF file, which llama.cpp reads beside its base in that format."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig

from lorakit.adapter.atomic_write import write_new_file
from lorakit.adapter.content import AdapterContent
from lorakit.adapter.fused_layers import WholeLayer, stack, whole_layers
from lorakit.adapter.peft import site_names
from lorakit.adapter.tensor_files import value_problems
from lorakit.errors import AdapterFileError, MissingExtraError, OutputError

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
"""transformers' model type: llama.cpp's name of the architecture."""
INTERLEAVED = ("llama", "smollm3")
"""The architectures whose queries and keys llama.cpp rotates in neighbouring pairs of rows, where
transformers rotates the first half of a head's rows with the second."""
_ADAPTED = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down))|output|token_embd", re.ASCII
)
"""The weights beside which llama.cpp computes an update."""


def check_library() -> None:
    """Make sure that GGUF files can be written.

    Raises:
        MissingExtraError: the library gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError("writing GGUF files", "gguf")


def check_family(config: PreTrainedConfig) -> None:
    """Make sure that llama.cpp knows the family of a base, before anything is loaded or computed.

    Raises:
        AdapterFileError: it does not, with those that it knows.
    """
    problems = list(_family_reasons(config))
    if problems:
        raise AdapterFileError.listing("llama.cpp cannot hold this adapter", problems)


def save_gguf(adapter: AdapterContent, file: Path, config: PreTrainedConfig) -> Path:
    """Write an adapter as a new GGUF file in float32, and return the file.

    llama.cpp computes alpha/r·B·A with one alpha for all layers: where a layer's scale is another,
    its B is multiplied by the ratio. Slices of a fused layer become one update of it.

    Args:
        adapter: of LoRA alone.
        file: where; its parents are made.
        config: of the base.

    Raises:
        AdapterFileError: llama.cpp cannot hold the adapter, with every reason, or a value is not
            finite.
        OutputError: the file exists, or cannot be written.
        MissingExtraError: the library gguf is not installed.
    """
    check_library()
    import gguf

    problems = value_problems(adapter.tensors)
    if problems:
        raise AdapterFileError.listing(f"the adapter was not written to {file}", problems)
    layers = _layers(adapter)
    names = _names(layers, config)
    reasons = [*_reasons(adapter, layers), *_layer_reasons(adapter, layers, names, config)]
    if reasons:
        raise AdapterFileError.listing("llama.cpp cannot hold this adapter", reasons)
    architecture = ARCHITECTURES[config.model_type]
    alpha, tensors = _tensors(adapter, layers, names, config)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, "adapter.gguf")
        writer = gguf.GGUFWriter(draft, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, values in tensors.items():
            writer.add_tensor(name, values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check(draft, file, tensors)
        write_new_file(file, draft.read_bytes())
    return file


def _check(draft: Path, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a file back, and compare it with what was to be written.

    Raises:
        OutputError: a tensor differs.
    """
    from gguf import GGUFReader

    found = {tensor.name: tensor.data for tensor in GGUFReader(draft).tensors}
    if found.keys() != tensors.keys() or any(
        not np.array_equal(found[name], values.numpy()) for name, values in tensors.items()
    ):
        raise OutputError(f"{file} was not written: it reads back differently")


def _layers(adapter: AdapterContent) -> tuple[WholeLayer, ...]:
    """The sites by layer, with a scale of 1: `_folded` has the scales in B."""
    sites = [replace(site, alpha=float(site.rank), scale=1.0) for site in adapter.sites]
    return whole_layers(sites, use_rslora=False)


def _folded(adapter: AdapterContent) -> dict[str, Tensor]:
    """A and scale·B of every site, in float64."""
    folded = {}
    for site in adapter.sites:
        folded[f"{site.name}.lora_a"] = adapter.tensors[f"{site.name}.lora_a"].double()
        folded[f"{site.name}.lora_b"] = adapter.tensors[f"{site.name}.lora_b"].double() * site.scale
    return folded


def _names(layers: tuple[WholeLayer, ...], config: PreTrainedConfig) -> dict[str, str]:
    """llama.cpp's names of the weights of layers, by path, as far as it has an update there."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = ARCHITECTURES.get(config.model_type)
    number = next((n for n, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if number is None:
        return {}
    table = get_tensor_name_map(number, config.num_hidden_layers)
    found = {layer.path: table.get_name(layer.path) or "" for layer in layers}
    return {path: name for path, name in found.items() if _ADAPTED.fullmatch(name)}


def _reasons(adapter: AdapterContent, layers: tuple[WholeLayer, ...]) -> Iterator[str]:
    """The reasons why the file could not hold an adapter, whatever its base is."""
    if adapter.method != "lora":
        yield f"it was made by {adapter.method}, and llama.cpp knows LoRA alone"
    elif not adapter.sites:
        yield "it has no low-rank update"
    if adapter.lora is not None and adapter.lora.layer_replication:
        yield f"its base repeats blocks (layer_replication {adapter.lora.layer_replication})"
    if adapter.loftq is not None:
        yield f"LoftQ ({adapter.loftq}) changed the weights of its base: merge it"
    if adapter.lora is not None and adapter.lora.use_dora:
        yield "it was made by DoRA, whose magnitudes have no place in the file"
    others = sorted(set(adapter.tensors).difference(site_names(layers)))
    if adapter.method == "lora" and others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        yield f"it has {len(others)} tensors that are no A or B of a layer ({shown}): merge it"


def _family_reasons(config: PreTrainedConfig) -> Iterator[str]:
    """The reason why the file could hold no adapter of such a base, if there is one."""
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        yield f"its base is a {config.model_type}; bases that can be written: {known}"


def _layer_reasons(
    adapter: AdapterContent,
    layers: tuple[WholeLayer, ...],
    names: Mapping[str, str],
    config: PreTrainedConfig,
) -> Iterator[str]:
    """The reasons why the file could not hold the updates of some layers of this base."""
    trained_on = adapter.base.architecture if adapter.base else config.model_type
    if config.model_type not in ARCHITECTURES:
        yield from _family_reasons(config)
        return
    if trained_on != config.model_type:
        yield f"it was trained on a {trained_on}, and the base is a {config.model_type}"
        return
    without = [layer.path for layer in layers if layer.path not in names]
    if without:
        shown = ", ".join(without[:3]) + (", …" if len(without) > 3 else "")
        yield f"llama.cpp has no update of {len(without)} of its layers ({shown})"
    for layer in layers:
        name = names.get(layer.path, "")
        if name in ("output", "token_embd") and config.tie_word_embeddings:
            yield f"{layer.path}: the base has one matrix for its embeddings and its head"
        if any(site.rows is not None and site.layer_rows is None for site in layer.sites):
            yield f"{layer.path}: the number of rows of the whole layer is not known"
        heads, first = _heads(name, config), layer.sites[0]
        rows = first.layer_rows or adapter.tensors[f"{first.name}.lora_b"].shape[0]
        if heads and rows % (2 * heads):
            yield f"{layer.path}: its {rows} rows are not those of {heads} heads: another base?"


def _heads(name: str, config: PreTrainedConfig) -> int:
    """The heads whose rows llama.cpp has in another order in a weight; 0: the order is the same."""
    if ARCHITECTURES[config.model_type] not in INTERLEAVED:
        return 0
    heads: int = config.num_attention_heads
    of = {"attn_q": heads, "attn_k": getattr(config, "num_key_value_heads", None) or heads}
    return of.get(name.rpartition(".")[2], 0)


def _tensors(
    adapter: AdapterContent,
    layers: tuple[WholeLayer, ...],
    names: Mapping[str, str],
    config: PreTrainedConfig,
) -> tuple[float, dict[str, Tensor]]:
    """The alpha of the file, and its tensors by name, in float32.

    A is (rank, d_in) and B (d_out, rank), but that of an embedding (vocabulary, rank).
    """
    widths = {layer.path: layer.width for layer in layers}
    alphas = Counter(site.scale * widths[site.path] for site in adapter.sites)
    # 0 would be read as: no alpha.
    alpha = float(np.float32(alphas.most_common(1)[0][0])) or 1.0
    folded, tensors = _folded(adapter), {}
    for layer in layers:
        name = names[layer.path]
        a, b = stack(layer, folded)
        b = b * (layer.width / alpha)
        if heads := _heads(name, config):
            b = _interleaved(b, heads)
        if layer.sites[0].kind == "embedding":
            a = a.T
        for end, values in (("a", a), ("b", b)):
            tensors[f"{name}.weight.lora_{end}"] = values.float().contiguous()
    return alpha, tensors


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key in llama.cpp's order: a row of each half of a head in turn."""
    halves = rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
