"""Names that layers had in earlier versions of transformers, for adapters trained with those."""

from __future__ import annotations

import re
from dataclasses import replace

from lorakit.adapter.adapter import Adapter
from lorakit.attachment.base_modules import BaseModules

OLDER = (
    (r"language_model\.lm_head(?=\.|$)", "lm_head"),
    (r"language_model\.model(?=\.|$)", "model.language_model"),
    (r"vision_tower(?=\.|$)", "model.vision_tower"),
    (r"multi_modal_projector(?=\.|$)", "model.multi_modal_projector"),
)
"""How the paths of Llava and its kin began before transformers 4.52, and how they begin now."""


def with_names_of(base: BaseModules, adapter: Adapter) -> Adapter:
    """An adapter whose layers have the names of a base, where these are the later ones.

    Where one of its layers is in the base by neither name, it is returned as it is.
    """
    paths = [site.module_path for site in adapter.sites]
    if not paths or any(path in base.by_path for path in paths):
        return adapter
    if not all(_now(path) in base.by_path for path in paths):
        return adapter
    return replace(
        adapter,
        sites=tuple(replace(site, path=_now(site.path)) for site in adapter.sites),
        tensors={_now(name): tensor for name, tensor in adapter.tensors.items()},
        copied_modules=tuple(map(_now, adapter.copied_modules)),
        # The words may have been paths.
        target_modules=(),
    )


def _now(name: str) -> str:
    """A path, or a tensor's name, with the beginning that it has now."""
    for older, newer in OLDER:
        if re.match(older, name):
            return re.sub(rf"^{older}", newer, name)
    return name
