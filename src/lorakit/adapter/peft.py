"""PEFT's adapter_config.json and tensors from an adapter, and the adapter's tensors from them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.expert_layers import names_in_file, unordered
from lorakit.adapter.fused_layers import (
    WholeLayer,
    obstacles,
    stack,
    stack_biases,
    unstack,
    unstack_biases,
    whole_layers,
)
from lorakit.adapter.peft_config import CONFIG_FILE, PeftConfig
from lorakit.config.block_ranges import block_order
from lorakit.config.methods import LoRAConfig

V = TypeVar("V")
PREFIX = "base_model.model."
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""The end of the name of trained rows of tokens, which are the rows, and no differences."""
BIAS_WORDS = {"none": "none", "lora": "lora_only", "all": "all"}
# For these PEFT adds the head to modules_to_save, and then expects it in the file.
TASKS_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# PEFT 0.21 multiplies B, a row for each of a group's ranks, with an A of all ranks and channels.
NORMS_OF_GROUPS = (
    "PEFT takes the norms of its DoRA from another matrix than its weight and update, so that both"
    " would not compute the same"
)


def keys_of(layer: WholeLayer, path: str) -> tuple[str, str]:
    """The names of a layer's A and B in the file, where it has a path of its own."""
    start = f"{PREFIX}{path}.lora_"
    if layer.sites[0].kind == "embedding":
        return f"{start}embedding_A", f"{start}embedding_B"
    return f"{start}A.weight", f"{start}B.weight"


def paths_in_file(layers: Iterable[WholeLayer]) -> dict[str, str]:
    """The path in the file of each layer: its own, but for parameters of experts."""
    layers = tuple(layers)
    names = names_in_file(each.path for each in layers if each.sites[0].is_of_experts)
    # PEFT wraps nn.MultiheadAttention, and its output projection within.
    places = {"in_proj": "{}", "out_proj": "{}.base_layer.out_proj"}
    for each in layers:
        first = each.sites[0]
        if first.kind in places:
            names[each.path] = places[first.kind].format(first.named_by)
    return {each.path: names.get(each.path, each.path) for each in layers}


def site_names(layers: Iterable[WholeLayer]) -> list[str]:
    """The adapter's names of the tensors of all sites."""
    sites = [site for layer in layers for site in layer.sites]
    ends = ("a", "b", "bias", "magnitude")
    return [f"{site.name}.lora_{end}" for site in sites for end in ends]


def magnitudes(layers: Iterable[WholeLayer], names: Collection[str]) -> Iterator[tuple[str, str]]:
    """The names of each DoRA magnitude: in the adapter, and in the file."""
    for layer in layers:
        name = f"{layer.sites[0].name}.lora_magnitude"
        if name in names:
            yield name, f"{PREFIX}{layer.path}.lora_magnitude_vector"


def _as_in_peft(layer: WholeLayer, tensors: Mapping[str, Tensor], values: Tensor) -> Tensor:
    """The magnitudes of a layer: (d_out,), and of a convolution (1, c_out, 1, …)."""
    b = tensors[f"{layer.sites[0].name}.lora_b"]
    return values if b.dim() == 2 else values.reshape(1, -1, *b.shape[2:])


def bias_key(layer: WholeLayer) -> str:
    """The name in the file of the bias of a layer's B."""
    return f"{PREFIX}{layer.path}.lora_B.bias"


def base_keys(names: Iterable[str], layers: Iterable[WholeLayer]) -> dict[str, str]:
    """The name in the file of each tensor that replaces a parameter of the base."""
    adapted = paths_in_file(layers)
    owners = {name: name.rpartition(".") for name in names}
    keys = {}
    for name, (owner, _, leaf) in owners.items():
        # PEFT wraps an adapted layer, so that its own parameters move down by one name.
        path = f"{adapted[owner]}.base_layer" if owner in adapted else owner
        keys[name] = f"{PREFIX}{path}.{TOKEN_ROWS if leaf == 'token_rows' else leaf}"
    return keys


def encode(layers: Sequence[WholeLayer], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors, made from an adapter's; on the meta device only names and shapes."""
    encoded: dict[str, Tensor] = {}
    paths = paths_in_file(layers)
    for layer in layers:
        encoded.update(zip(keys_of(layer, paths[layer.path]), stack(layer, tensors), strict=True))
    biased = [each for each in layers if f"{each.sites[0].name}.lora_bias" in tensors]
    encoded |= {bias_key(layer): stack_biases(layer, tensors) for layer in biased}
    for layer in layers:
        own = dict(magnitudes([layer], tensors))
        encoded |= {key: _as_in_peft(layer, tensors, tensors[name]) for name, key in own.items()}
    others = set(tensors).difference(site_names(layers))
    return encoded | {key: tensors[name] for name, key in base_keys(others, layers).items()}


def decode(
    layers: Sequence[WholeLayer], names: Collection[str], encoded: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """The adapter's tensors, made from PEFT's, and the problems of PEFT's tensors.

    Args:
        layers: the adapter's sites by layer.
        names: names of all of the adapter's tensors.
        encoded: tensors of the names and shapes that `encode` gives.
    """
    tensors: dict[str, Tensor] = {}
    problems, paths = [], paths_in_file(layers)
    for layer in layers:
        key_a, key_b = keys_of(layer, paths[layer.path])
        parts = unstack(layer, encoded[key_a], encoded[key_b])
        if parts is None:
            problems.append(f"{key_b}  holds values outside the rows and columns of its slices")
        tensors |= parts or {}
        if f"{layer.sites[0].name}.lora_bias" in names:
            biases = unstack_biases(layer, encoded[bias_key(layer)])
            if biases is None:
                problems.append(f"{bias_key(layer)}  holds values outside the rows of its slices")
            tensors |= biases or {}
    tensors |= {name: encoded[key].flatten() for name, key in magnitudes(layers, names)}
    others = set(names).difference(site_names(layers))
    tensors |= {name: encoded[key] for name, key in base_keys(others, layers).items()}
    return tensors, problems


def layers_of(adapter: AdapterContent) -> tuple[WholeLayer, ...]:
    """An adapter's sites by layer."""
    return whole_layers(adapter.sites, use_rslora=_settings(adapter).use_rslora)


def _settings(adapter: AdapterContent) -> LoRAConfig:
    """The settings of an adapter's low-rank updates."""
    return adapter.lora or LoRAConfig()


def reasons_against(adapter: AdapterContent) -> list[str]:
    """The reasons why PEFT has no exact form of an adapter; empty where it has one."""
    if adapter.method != "lora":
        return [f"it was made by {adapter.method}"]
    if not adapter.sites:
        return ["nothing but biases, full copies and rows of tokens is trained"]
    layers = layers_of(adapter)
    reasons = [reason for layer in layers for reason in obstacles(layer, adapter.tensors)]
    reasons += [
        f"{site.name}: PEFT's DoRA has the magnitudes of all rows of a layer, and this is a slice"
        for site in adapter.sites
        if _settings(adapter).use_dora and site.rows is not None
    ]
    reasons += [
        f"{site.name}: {NORMS_OF_GROUPS}"
        for site in adapter.sites
        if _settings(adapter).use_dora and site.groups > 1
    ]
    reasons += _lone_projections(layers)
    parameters = [layer.path for layer in layers if layer.sites[0].is_of_experts]
    reasons += [
        f"{path}: PEFT tells a module's parameters apart by their order, which is not known here"
        for path in unordered(parameters)
    ]
    config = PeftConfig.model_validate(peft_config(adapter, layers))
    return reasons + [
        f"{layer.path}: PEFT would read rank and alpha of another layer for it"
        for layer in layers
        if not _reads(config, layer)
    ]


def _lone_projections(layers: Iterable[WholeLayer]) -> Iterator[str]:
    """Yield a line for each nn.MultiheadAttention of which PEFT would adapt more, or otherwise."""
    of_each: dict[str, list[WholeLayer]] = {}
    for layer in layers:
        if layer.sites[0].kind in ("in_proj", "out_proj"):
            of_each.setdefault(layer.sites[0].named_by, []).append(layer)
    for path, own in of_each.items():
        if len(own) != 2 or len({(layer.rank, layer.scale) for layer in own}) > 1:
            yield f"{path}: PEFT adapts in_proj and out_proj together, with one rank and one scale"


def _reads(config: PeftConfig, layer: WholeLayer) -> bool:
    path = layer.sites[0].named_by
    try:
        return (config.rank_of(path), config.scale_of(path)) == (layer.rank, layer.scale)
    except re.error:
        return False


def peft_config(adapter: AdapterContent, layers: Sequence[WholeLayer]) -> dict[str, Any]:
    """The content of adapter_config.json: the fields that PEFT knows since 0.14, in order."""
    ranks = {layer.sites[0].named_by: layer.rank for layer in layers}
    alphas = {layer.sites[0].named_by: _short(layer.alpha) for layer in layers}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    task = adapter.card.get("task_type")
    needs_head = task in TASKS_WITH_HEAD and not adapter.copied_modules
    parameters = sorted(
        s.named_by for s in (each.sites[0] for each in layers) if s.is_target_parameter
    )
    modules = sorted(adapter.target_modules or ranks.keys() - set(parameters))
    config = {
        "alpha_pattern": {path: own for path, own in sorted(alphas.items()) if own != alpha},
        "base_model_name_or_path": adapter.base_name or None,
        "bias": BIAS_WORDS[_settings(adapter).bias],
        "fan_in_fan_out": any(site.kind == "transposed" for site in adapter.sites),
        "inference_mode": True,
        "init_lora_weights": True if adapter.loftq is None else "loftq",
        "lora_alpha": alpha,
        "lora_dropout": _settings(adapter).dropout,
        "modules_to_save": sorted(adapter.copied_modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {path: own for path, own in sorted(ranks.items()) if own != rank},
        "revision": None,
        "target_modules": modules or None,
        "task_type": None if needs_head else task,
        "use_dora": _settings(adapter).use_dora,
        "use_rslora": _settings(adapter).use_rslora,
    }
    beside = {
        "loftq_config": _loftq_config(adapter),
        "target_parameters": parameters,
        "layer_replication": _block_ranges(_settings(adapter).layer_replication),
        "lora_bias": _settings(adapter).lora_bias,
        "ensure_weight_tying": _settings(adapter).ensure_weight_tying,
        "trainable_token_indices": _settings(adapter).trainable_token_indices,
    }
    return config | {key: value for key, value in beside.items() if value}


def _loftq_config(adapter: AdapterContent) -> dict[str, int]:
    """How LoftQ changed the base, as PEFT writes it; empty: it did not."""
    how = adapter.loftq
    return {} if how is None else {"loftq_bits": how.bits, "loftq_iter": how.iterations}


def _block_ranges(order: str | None) -> list[list[int]]:
    """The order of a base's blocks as PEFT writes it: the first, and the one behind the last."""
    numbers = block_order(order) if order else ()
    starts = [at for at, n in enumerate(numbers) if at == 0 or n != numbers[at - 1] + 1]
    ends = [*starts[1:], len(numbers)]
    return [
        [numbers[start], numbers[end - 1] + 1] for start, end in zip(starts, ends, strict=False)
    ]


def _short(number: float) -> int | float:
    """A whole number as an int: some readers of the file want one."""
    return int(number) if number == int(number) else number


def _commonest(values: Iterable[V]) -> V:
    return Counter(values).most_common(1)[0][0]


def disagreements(
    config: PeftConfig, adapter: AdapterContent, layers: Sequence[WholeLayer]
) -> Iterator[str]:
    """A line for each field of PEFT's configuration that differs from what lorakit.json implies."""
    for layer in layers:
        path = layer.sites[0].named_by
        found = config.scale_of(path)
        if config.rank_of(path) != layer.rank:
            yield (
                f"{CONFIG_FILE}  gives {layer.path} rank {config.rank_of(path)}, "
                f"but it was saved with {layer.rank}"
            )
        elif found != layer.scale:
            yield (
                f"{CONFIG_FILE}  gives {layer.path} the scale {found:g}, but it was trained with "
                f"{layer.scale:g}: was lora_alpha, a pattern or use_rslora edited?"
            )
    expected = peft_config(adapter, layers)
    for key in ("target_modules", "target_parameters", "modules_to_save", "bias"):
        value, saved = getattr(config, key), expected.get(key)
        if _as_set(value) != _as_set(saved):
            yield f"{CONFIG_FILE}  {key} is {value!r}, but it was saved as {saved!r}"
    for key in ("use_dora", "lora_bias", "ensure_weight_tying"):
        if getattr(config, key) != expected.get(key, False):
            yield f"{CONFIG_FILE}  {key} is {getattr(config, key)}, but it was saved otherwise"
    blocks, saved = config.layer_replication or [], expected.get("layer_replication", [])
    if blocks != saved:
        yield f"{CONFIG_FILE}  layer_replication is {blocks}, but it was saved as {saved}"
    if config.loftq != adapter.loftq:
        yield f"{CONFIG_FILE}  its LoftQ is {config.loftq}, but it was saved with {adapter.loftq}"
    tokens = expected.get("trainable_token_indices", {})
    if (config.trainable_token_indices or {}) != tokens:
        yield f"{CONFIG_FILE}  trainable_token_indices are others than those that were saved"
    for key in ("exclude_modules", "layers_to_transform"):
        if getattr(config, key):
            yield f"{CONFIG_FILE}  {key} was added after the adapter was saved"


def _as_set(value: list[str] | str | None) -> set[str]:
    return {value} if isinstance(value, str) else set(value or ())


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor of a file that is missing, unexpected or of another shape.

    Args:
        expected: what should be there; the values do not matter, so they may be on meta.
        found: what is there.
    """
    lines = [f"{key}  missing from the file" for key in sorted(set(expected) - set(found))]
    lines += [f"{key}  unexpected{hint(key)}" for key in sorted(set(found) - set(expected))]
    for key in sorted(set(expected) & set(found)):
        want, have = expected[key], found[key]
        if have.shape != want.shape:
            lines.append(
                f"{key}  shape {tuple(have.shape)} in the file, {tuple(want.shape)} expected"
                f"{_rank_hint(key, have.shape, want.shape)}"
            )
        elif have.dtype != want.dtype:
            kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (have, want)]
            lines.append(f"{key}  is {kinds[0]} in the file, {kinds[1]} expected")
    return lines


def _rank_hint(key: str, have: torch.Size, want: torch.Size) -> str:
    """A question after a shape that only another rank explains."""
    half = key.removesuffix(".weight")[-2:]
    if half not in ("_A", "_B") or len(have) != len(want) or len(have) < 2:
        return ""
    axis = 0 if half == "_A" else 1
    differing = [each for each in range(len(have)) if have[each] != want[each]]
    return f": was it trained with rank {have[axis]}?" if differing == [axis] else ""


def hint(key: str) -> str:
    """The probable reason why a tensor's name is not PEFT's, as the end of a message; else ""."""
    if key.startswith(PREFIX * 2):
        return f": {PREFIX!r} is there twice; was the model wrapped twice when it was saved?"
    if not key.startswith(PREFIX):
        return f": it does not start with {PREFIX!r}"
    extra = re.search(r"\.lora_(?:embedding_)?[AB]\.([^.]+)(?:\.weight)?$", key)
    if extra and extra[1] not in ("weight", "bias"):
        return f": the name of an adapter, {extra[1]!r}, was left in it"
    return ""
