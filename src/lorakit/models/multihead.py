"""torch's nn.MultiheadAttention, which reads its weights itself.

The weights of q, k and v are one parameter of its own, `in_proj_weight`, and the output projection
is a child that it never calls. SigLIP's pooling head has one, and so has each block of open_clip.
"""

from __future__ import annotations

from torch import nn

from lorakit.upstream.private_names import own_parameters

IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"
"""The parameter with q, k and v, and the child that projects the output."""


def is_multihead(module: nn.Module) -> bool:
    """Whether a module is one whose q, k and v are one parameter: their inputs are equally wide."""
    is_kind = isinstance(module, nn.MultiheadAttention)
    return is_kind and own_parameters(module).get(IN_PROJ) is not None
