"""nn.MultiheadAttention in PEFT's files: A and B of q, k and v have the name of its wrapper, and
those of the output projection are within it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lorakit.adapter.site import LayerKind
from lorakit.models.multihead import IN_PROJ, OUT_PROJ

WITHIN = f".base_layer.{OUT_PROJ}"
"""The output projection, after the path of the module."""


def multiheads_in(names: Iterable[str]) -> frozenset[str]:
    """The paths of the modules whose output projection has A or B within its wrapper."""
    parts = (name.partition(f"{WITHIN}.lora_") for name in names)
    return frozenset(path for path, mark, _ in parts if mark)


def own_name(name: str, multiheads: Collection[str]) -> str:
    """A name in a file, with the path that its layer or parameter has in the base.

    Args:
        name: such as `head.attention.lora_A.weight`, which is of `head.attention.in_proj_weight`.
        multiheads: the paths of the file's nn.MultiheadAttention.
    """
    path, mark, end = name.partition(f"{WITHIN}.")
    if mark and path in multiheads:
        return f"{path}.{OUT_PROJ}.{end}"
    path, mark, end = name.rpartition(".lora_")
    return f"{path}.{IN_PROJ}.lora_{end}" if path in multiheads else name


def kind_of(path: str, multiheads: Collection[str]) -> LayerKind:
    """The kind of a layer that is no embedding, as far as names show it."""
    owner, _, leaf = path.rpartition(".")
    kinds: dict[str, LayerKind] = {IN_PROJ: "in_proj", OUT_PROJ: "out_proj"}
    return kinds.get(leaf, "linear") if owner in multiheads else "linear"
