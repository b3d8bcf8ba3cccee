"""The rows of the batch in what layers are given: one entry each, several, or none."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lorakit.models.base import base_modules
from lorakit.models.experts import expert_matrices, gets_all_tokens
from lorakit.models.families import family_of
from lorakit.models.multihead import is_multihead
from lorakit.models.paths import ends_with, is_within
from lorakit.models.reads import only_read
from lorakit.models.routers import is_own_kind

_WINDOWS = tuple(
    f"{attention}.{layer}"
    for attention, layers in {
        "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "self": ("query", "key", "value"),
        "attention.output": ("dense",),
    }.items()
    for layer in layers
)

_SHARED_EXPERT = (
    *(f"shared_expert.{layer}" for layer in ("gate_proj", "up_proj", "down_proj")),
    "shared_expert_gate",
)

PIECES: Mapping[str, tuple[str, ...]] = {
    # Tokens without a dimension of rows.
    "opt": ("fc1", "fc2", "final_layer_norm", "activation_fn"),
    "qwen2_moe": _SHARED_EXPERT,
    "llama4_text": _SHARED_EXPERT,
    # The windows of each image.
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "donut-swin": _WINDOWS,
    "maskformer-swin": _WINDOWS,
}
"""By model type: ends of the paths of layers whose input has several entries for each row along its
first dimension, one row after the other."""

FEATURES = ("get_image_features", "get_video_features", "get_audio_features")
"""The methods of transformers' models by which rows of tokens get images, videos or sounds."""


def layers_in_pieces(model: nn.Module) -> frozenset[str]:
    """The paths of the layers whose input has several entries for each row (`PIECES`)."""
    ends = PIECES.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    paths = (path for path, _ in base_modules(model))
    found = {path for path in paths if any(ends_with(path, end) for end in ends)}
    experts = (path for path, m in base_modules(model) if expert_matrices(m) and gets_all_tokens(m))
    routers = (path for path, module in base_modules(model) if is_own_kind(module))
    return frozenset({*found, *experts, *routers, *modules_of_experts(model)})


def modules_of_experts(model: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that give each of their children those tokens that chose it."""
    end = family_of(model).experts
    return tuple(path for path, _ in base_modules(model) if end and ends_with(path, end))


def within_experts(model: nn.Module) -> dict[str, str]:
    """The path of the module of experts that a layer is in, by the layer's path.

    Such a layer is given the tokens that chose its expert, which do not say whose they are.
    """
    outer = modules_of_experts(model)
    return {
        path: own
        for own in outer
        for path, _ in base_modules(model)
        if path != own and is_within(path, (own,))
    }


def layers_for_all_rows(model: nn.Module) -> dict[str, str]:
    """Why rows cannot have adapters of their own in a layer, by its path."""
    ends = family_of(model).shared_by_batch
    of_images = _outside_text(model)
    reads = only_read(model)
    reasons = {}
    for path, module in base_modules(model):
        if any(ends_with(path, end) for end in ends):
            reasons[path] = "have an input all rows share"
        elif expert_matrices(module) and not gets_all_tokens(module):
            reasons[path] = "are given tokens by expert, which do not say whose they are"
        elif path in reads or is_multihead(module):
            reasons[path] = "have a weight that the model reads by itself, once for all rows"
        elif path in of_images:
            reasons[path] = "are given images, videos or sounds, which are no rows of the batch"
    return reasons


def _outside_text(model: nn.Module) -> set[str]:
    """The paths of the modules that make features for rows of tokens.

    A row may have several images or none, so that an image's number says nothing of its row.
    """
    if not any(hasattr(model, name) for name in FEATURES):
        return set()
    inside: set[int] = set()
    for getter in ("get_decoder", "get_input_embeddings", "get_output_embeddings"):
        try:
            found = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            continue
        inside |= set() if found in (None, model) else set(map(id, found.modules()))
    return {path for path, module in base_modules(model) if path and id(module) not in inside}
