"""Reading PEFT's own folders, which have no lorakit.json: sites from names, shapes and settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lorakit.adapter.content import AdapterContent
from lorakit.adapter.expert_layers import WRAPPED, parameter_of
from lorakit.adapter.peft import PREFIX, TOKEN_ROWS, hint
from lorakit.adapter.peft_config import CONFIG_FILE, PeftConfig
from lorakit.adapter.peft_multihead import kind_of, multiheads_in, own_name
from lorakit.adapter.peft_sites import site_of, site_of_experts
from lorakit.adapter.peft_tokens import absent_tokens, tokens_of
from lorakit.adapter.site import LayerKind, Site
from lorakit.adapter.tied_sites import tied_by_values
from lorakit.config.methods import LoRAConfig
from lorakit.models.roles import ROLES
from lorakit.models.target_words import GROUPS
from lorakit.upstream.private_names import COMPILED_WRAPPER

BIAS_KEY = re.compile(r"(?P<path>.+)\.lora_B\.bias")
LORA_KEY = re.compile(r"(?P<path>.+)\.lora_(?:(?P<end>[AB])\.weight|embedding_(?P<embedding>[AB]))")
# Some versions of PEFT write the longer name.
MAGNITUDE_KEY = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(\.weight)?")
# PEFT adds these to modules_to_save for a task; a model has one of them.
HEADS = ("classifier", "score", "qa_outputs")
OF_NO_PARAMETER = f": it is of a parameter that target_parameters in {CONFIG_FILE} does not name"
# What transformers calls input embeddings and output heads; PEFT saves them after a resize.
EMBEDDINGS = (
    "embed_in",
    "embed_out",
    "embed_tokens",
    "lm_head",
    "shared",
    "word_embeddings",
    "wte",
)


@dataclass
class _Sorted:
    """The tensors of a file by what they are."""

    updates: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """"a" and "b" of each adapted layer, by its path; "bias" of B and DoRA's "magnitude", too."""
    embeddings: set[str] = field(default_factory=set)
    """Paths of the adapted layers that are embeddings."""
    multiheads: frozenset[str] = frozenset()
    """Paths of the adapted nn.MultiheadAttention."""
    parameters: set[str] = field(default_factory=set)
    """Paths of the adapted parameters of experts."""
    weights: set[str] = field(default_factory=set)
    """Paths of the modules whose weight is named as a parameter: of routers, or of layers."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Biases and full copies, by the base's own names."""
    copied: set[str] = field(default_factory=set)
    """Paths of the modules copied in full."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """The tokens whose rows are trained, by the path of their module."""
    frozen: list[str] = field(default_factory=list)
    """Names of the base's own, untrained weights in the file."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_peft(
    config: PeftConfig, tensors: Mapping[str, Tensor]
) -> tuple[AdapterContent | None, list[str]]:
    """The adapter in PEFT's two files, or None and the problems.

    Args:
        config: the content of adapter_config.json.
        tensors: the tensors of the weights file.

    Returns:
        The adapter, whose `unverified` says what the files cannot prove, and no problems; or None
        and a line for each problem.
    """
    found = _sort(config, tensors)
    problems = found.problems + list(_absent_copies(config, found))
    problems += absent_tokens(config, found.tokens)
    sites: list[Site] = []
    named: dict[str, Tensor] = dict(found.replaced)
    for path in sorted(found.updates, key=_natural):
        kind: LayerKind = "router" if path in found.weights else kind_of(path, found.multiheads)
        kind = "embedding" if path in found.embeddings else kind
        make = site_of_experts if path in found.parameters else site_of
        try:
            site, parts, wrong = make(config, path, kind, found.updates[path])
        except re.error as error:
            problems.append(f"{CONFIG_FILE}  rank_pattern or alpha_pattern: {error}")
            break
        problems += wrong
        if site is not None:
            sites.append(site)
            named |= parts
    if not found.updates:
        problems.append("it holds no update: no tensor is called ….lora_A.weight")
    if problems:
        return None, problems
    if config.ensure_weight_tying and not config.use_dora:
        sites = list(tied_by_values(sites, named))
    ties = _has_ties(config, sites, found)
    facts = {"base_model": config.base_model_name_or_path, "task_type": config.task_type}
    adapter = AdapterContent(
        configs=(
            _lora_config(config, sites, named, tuple(sorted(found.copied))).model_copy(
                update={"trainable_token_indices": found.tokens, "ensure_weight_tying": ties}
            ),
        ),
        sites=tuple(sites),
        tensors=named,
        copied_modules=tuple(sorted(found.copied)),
        target_modules=_plain_targets(config),
        loftq=config.loftq,
        card={key: value for key, value in facts.items() if value},
        unverified=(
            *_unproven(config),
            *([] if ties or not config.ensure_weight_tying else [_apart_note(config)]),
            *found.notes,
            *_loftq_note(config),
            *_doubled_note(config, sites),
            *_frozen_note(found.frozen),
        ),
    )
    return adapter, []


def _sort(config: PeftConfig, tensors: Mapping[str, Tensor]) -> _Sorted:
    found = _Sorted()
    others: dict[str, Tensor] = {}
    # A base that was compiled before it was adapted.
    names = {k: k.removeprefix(PREFIX).replace(f"{COMPILED_WRAPPER}.", "") for k in tensors}
    found.multiheads = multiheads_in(names.values())
    for key, tensor in sorted(tensors.items()):
        name = own_name(names[key], found.multiheads)
        match = LORA_KEY.fullmatch(name)
        parameter = _parameter(config, match["path"], tensor) if match else None
        is_inside = match is not None and WRAPPED in match["path"].split(".")
        if hint(key) or (is_inside and parameter is None):
            found.problems.append(f"{key}  unexpected{hint(key) or OF_NO_PARAMETER}")
        elif match:
            path, end = match["path"], match["end"] or match["embedding"]
            if parameter is not None:
                path = parameter.removesuffix(".weight")
                (found.parameters if path == parameter else found.weights).add(path)
            update = found.updates.setdefault(path, {})
            if end.lower() in update:
                found.problems.append(f"{key}  unexpected: {path} has a lora_{end} already")
            update[end.lower()] = tensor
            if match["embedding"]:
                found.embeddings.add(path)
        elif config.lora_bias and (match := BIAS_KEY.fullmatch(name)):
            found.updates.setdefault(match["path"], {})["bias"] = tensor
        elif config.use_dora and (match := MAGNITUDE_KEY.fullmatch(name)):
            found.updates.setdefault(match["path"], {})["magnitude"] = tensor
        else:
            others[name] = tensor
    for name, tensor in others.items():
        _sort_other(config, found, name, tensor, others)
    return found


def _parameter(config: PeftConfig, path: str, tensor: Tensor) -> str | None:
    """The path of the parameter whose A or B a tensor is; None: it is of a layer."""
    if not config.target_parameters or _is_target(config, path, tensor):
        return None
    return parameter_of(path, config.target_parameters)


def _is_target(config: PeftConfig, path: str, tensor: Tensor) -> bool:
    """Whether a path is of a layer that the target modules name."""
    words = config.target_modules
    if words == "all-linear":
        # Experts have a rank each, so that there are more than those of a layer.
        return config.rank_of(path) in tensor.shape
    if isinstance(words, str):
        return re.fullmatch(words, path) is not None
    return any(path == word or path.endswith(f".{word}") for word in words or ())


def _sort_other(
    config: PeftConfig,
    found: _Sorted,
    name: str,
    tensor: Tensor,
    others: Mapping[str, Tensor],
) -> None:
    """Sort a tensor that is neither A nor B."""
    owner, _, leaf = name.rpartition(".")
    adapted = owner.removesuffix(".base_layer")
    copied = _copied_path(config, name)
    if name.endswith(f".{TOKEN_ROWS}"):
        path = name.removesuffix(f".{TOKEN_ROWS}")
        found.tokens[path], problem = tokens_of(config, path, tensor)
        found.problems += problem
        found.replaced[f"{path}.token_rows"] = tensor
    elif owner.endswith(".token_adapter.base_layer") and config.trainable_token_indices:
        found.frozen.append(f"{owner.removesuffix('.token_adapter.base_layer')}.{leaf}")
    elif adapted != owner and adapted in found.updates and leaf == "weight":
        found.frozen.append(f"{adapted}.weight")
    elif adapted != owner and adapted in found.updates and leaf == "bias" and config.bias != "none":
        found.replaced[f"{adapted}.bias"] = tensor
    elif copied:
        _sort_copy(found, copied, name, tensor, others)
    elif leaf == "bias" and config.bias == "all" and not _is_lora(owner):
        found.replaced[name] = tensor
    elif leaf == "weight" and owner.rpartition(".")[2] in EMBEDDINGS:
        found.copied.add(owner)
        found.replaced[name] = tensor
        found.notes.append(f"why {name} is in the file: it is taken as a full copy")
    else:
        found.problems.append(_unexpected(config, name))


def _sort_copy(
    found: _Sorted, path: str, name: str, tensor: Tensor, others: Mapping[str, Tensor]
) -> None:
    """Sort a tensor of a module copied in full; with bias='all' PEFT writes some three times."""
    wrapper, _, inner = name.removeprefix(f"{path}.").partition(".")
    own_name = f"{path}.{inner}"
    if wrapper == "original_module" and inner:
        found.frozen.append(own_name)
    elif wrapper == "modules_to_save" and inner:
        if own_name not in others or not torch.equal(others[own_name], tensor):
            found.problems.append(f"{PREFIX}{name}  differs from its other copy")
    else:
        found.copied.add(path)
        found.replaced[name] = tensor


def _unexpected(config: PeftConfig, name: str) -> str:
    reason = ": it is neither A nor B of a layer, nor in modules_to_save"
    if name.endswith(".bias") and not _is_lora(name):
        reason = f": {CONFIG_FILE} says bias={config.bias!r}"
    elif BIAS_KEY.fullmatch(name):
        reason = f": {CONFIG_FILE} says lora_bias={config.lora_bias}"
    elif MAGNITUDE_KEY.fullmatch(name):
        reason = f": {CONFIG_FILE} says use_dora={config.use_dora}"
    return f"{PREFIX}{name}  unexpected{reason}"


def _is_lora(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _copied_path(config: PeftConfig, name: str) -> str | None:
    """The path of the copied module that a tensor is in: PEFT compares the end of the path."""
    parts = name.split(".")[:-1]
    paths = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
    words = config.modules_to_save or []
    return next((path for path in paths if any(path.endswith(word) for word in words)), None)


def _absent_copies(config: PeftConfig, found: _Sorted) -> Iterator[str]:
    for word in config.modules_to_save or []:
        is_there = any(path.endswith(word) for path in found.copied)
        if not is_there and not (word in HEADS and found.copied):
            yield f"{CONFIG_FILE}  modules_to_save names {word!r}, but the file has nothing of it"


def _natural(path: str) -> list[tuple[int, str]]:
    """The sort key that puts block 10 behind block 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _lora_config(
    config: PeftConfig, sites: list[Site], tensors: Mapping[str, Tensor], copied: tuple[str, ...]
) -> LoRAConfig:
    biases: dict[str, Literal["none", "lora", "all"]] = {"lora_only": "lora", "all": "all"}
    dtype = str(tensors[f"{sites[0].name}.lora_a"].dtype).removeprefix("torch.")
    return LoRAConfig(
        rank=config.r,
        alpha=float(config.lora_alpha),
        targets=_target_words(config, sites),
        exclude=_words(config.exclude_modules),
        layers=_layers(config),
        dropout=config.lora_dropout,
        bias=biases.get(config.bias, "none"),
        rank_pattern={site.path: site.rank for site in sites if site.rank != config.r},
        alpha_pattern={site.path: site.alpha for site in sites if site.alpha != config.lora_alpha},
        use_rslora=config.use_rslora,
        layer_replication=config.block_order,
        use_dora=config.use_dora,
        lora_bias=config.lora_bias,
        init="gaussian" if config.init_lora_weights == "gaussian" else "kaiming",
        modules_to_save=copied,
        dtype="float32" if dtype == "float64" else dtype,
    )


def _target_words(config: PeftConfig, sites: list[Site]) -> tuple[str, ...]:
    """The targets that select in lorakit what PEFT's words select."""
    words = config.target_modules
    # With tying, layers are adapted that no word names.
    if config.target_parameters or config.ensure_weight_tying:
        return tuple(site.path for site in sites)
    # layers_pattern has no counterpart in lorakit, so the layers are named one by one.
    if not words or (config.layers_pattern and config.layers_to_transform is not None):
        return tuple(site.path for site in sites)
    return ("all-linear",) if words == "all-linear" else _words(words)


def _words(modules: list[str] | str | None) -> tuple[str, ...]:
    """PEFT's names of modules in lorakit's words."""
    if isinstance(modules, str):
        return (f"re:{modules}",)
    return tuple(_word(name) for name in sorted(modules or ()))


def _word(name: str) -> str:
    """A module's name as the end of a path, spelt so that it cannot be read as a role."""
    plain = name not in (*ROLES, *GROUPS, "all-linear") and re.fullmatch(r"[\w.-]+", name)
    return name if plain else rf"re:(.*\.)?{re.escape(name)}"


def _layers(config: PeftConfig) -> str | None:
    blocks = config.layers_to_transform
    if blocks is None or blocks == [] or config.layers_pattern:
        return None
    return ",".join(map(str, sorted(blocks) if isinstance(blocks, list) else [blocks]))


def _plain_targets(config: PeftConfig) -> tuple[str, ...]:
    """PEFT's list of module names, where no other setting narrows it; else nothing."""
    narrowed = (
        config.ensure_weight_tying
        or config.exclude_modules
        or config.layers_to_transform is not None
    )
    words = config.target_modules
    return () if narrowed or not isinstance(words, list) else tuple(sorted(words))


def _unproven(config: PeftConfig) -> tuple[str, ...]:
    name = config.base_model_name_or_path
    called = f"{name!r} by {CONFIG_FILE}" if name else "not named"
    return (
        f"the base ({called}): PEFT's files can't tell it from another model of the same shapes",
        "the weights: PEFT's files have no hash, so a change before this reading went unnoticed",
        f"the scales: they are what {CONFIG_FILE} gave at this reading",
        "the list of layers: a layer that was dropped is noticed only where the targets name it",
    )


def _has_ties(config: PeftConfig, sites: list[Site], found: _Sorted) -> bool:
    """Whether tied layers have equal values in the file, as PEFT meant to train them."""
    weights = [found.replaced.get(f"{path}.weight") for path in found.copied]
    copies = [weight for weight in weights if weight is not None]
    equal = any(
        torch.equal(one, other) for at, one in enumerate(copies) for other in copies[at + 1 :]
    )
    tied = any(site.tied_to is not None for site in sites)
    return config.ensure_weight_tying and not config.use_dora and (tied or equal)


def _apart_note(config: PeftConfig) -> str:
    # DoRA's magnitudes are of the rows of each layer's own matrix, and one is the other transposed.
    why = (
        "lorakit trains DoRA of each layer for itself"
        if config.use_dora
        else "the file has no two with the same values"
    )
    return (
        f"that tied layers were trained as one (ensure_weight_tying): {why}, so that each keeps "
        "its own"
    )


def _loftq_note(config: PeftConfig) -> tuple[str, ...]:
    if config.loftq is None:
        return ()
    return (
        f"what LoftQ ({config.loftq}) made of the base's layers: they are quantised anew, and a "
        "weight between two values may become the other one on another machine",
    )


def _doubled_note(config: PeftConfig, sites: list[Site]) -> tuple[str, ...]:
    paths = [site.path for site in sites if site.kind == "out_proj"]
    if not paths:
        return ()
    how = "twice, as PEFT up to 0.21 adds them" if config.adds_twice else "once"
    return (f"how often the updates of {', '.join(paths)} count: they are read {how}",)


def _frozen_note(names: list[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (f"the base's own {', '.join(names)}: in the file, but not compared with the base",)
