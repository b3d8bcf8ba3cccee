"""How low-rank updates start: as the settings say, and so that the model answers as before."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorakit.adapter.site import Site
from lorakit.config.methods import LoRAConfig
from lorakit.kernels import plain
from lorakit.methods.lora.eva import SingularVectors
from lorakit.methods.lora.lora import matrix_of, parameter_shapes


def fresh_tensors(
    layer: nn.Module, site: Site, config: LoRAConfig, vectors: SingularVectors | None
) -> dict[str, Tensor]:
    """The tensors of a fresh update, by the last parts of their names in an adapter.

    Args:
        layer: the layer of the base.
        site: the update; random numbers are drawn from torch's global generator.
        config: how it starts.
        vectors: for init eva, the right singular vectors of the layer's inputs.
    """
    shape_a, shape_b = parameter_shapes(layer, site)
    if config.init == "pissa":
        a, b = _principal(matrix_of(layer, site), site, config)
    elif config.init == "eva":
        assert vectors is not None
        # A copy: layers that read the same have the same vectors, and each trains its own A.
        a, b = vectors.rows[: site.rank].clone(), torch.zeros(shape_b)
    else:
        a, b = fresh_a(shape_a, layer, config), torch.zeros(shape_b)
    padding = layer.padding_idx if isinstance(layer, nn.Embedding) else None
    if padding is not None:
        # No gradient reaches it, and the answer for a padding token stays the base's.
        a[:, padding] = 0
    made = {"lora_a": a.reshape(shape_a), "lora_b": b.reshape(shape_b)}
    if config.lora_bias:
        made["lora_bias"] = torch.zeros(shape_b[0])
    if config.use_dora:
        # As forward passes compute them, so that at the start both are equal in every bit.
        matrix = matrix_of(layer, site)
        none = torch.zeros(1, sum(matrix.shape), device=matrix.device)
        of_a, of_b = none.split([matrix.shape[1], matrix.shape[0]], dim=1)
        made["lora_magnitude"] = plain.row_norms(matrix, of_a, of_b.T, 1.0)
    return made


def fresh_a(shape: tuple[int, ...], layer: nn.Module, config: LoRAConfig) -> Tensor:
    """A random A in float32, drawn from torch's global generator.

    The fan-in is that of the layer's weight, except for an embedding: its input is one-hot, so one
    entry counts, whatever the vocabulary.
    """
    a = torch.empty(shape)
    fan_in = shape[0] if isinstance(layer, nn.Embedding) else a[0].numel()
    if len(shape) == 3 and not isinstance(layer, nn.Conv1d):
        # Each expert has a start of its own.
        return torch.stack([fresh_a(shape[1:], layer, config) for _ in range(shape[0])])
    if config.init == "gaussian":
        return nn.init.normal_(a, std=1 / math.sqrt(fan_in))
    if config.init == "orthogonal":
        # kaiming's entries have variance 1/(3·fan-in); this spreads their sum.
        vectors = min(shape[0], a[0].numel())
        return nn.init.orthogonal_(a, gain=math.sqrt(a.numel() / (3 * fan_in * vectors)))
    bound = 1 / math.sqrt(fan_in)  # kaiming_uniform_(a=√5) of torch's own Linear
    return nn.init.uniform_(a, -bound, bound)


def _principal(matrix: Tensor, site: Site, config: LoRAConfig) -> tuple[Tensor, Tensor]:
    """[A; A₀] and [B, −B₀], where scale·B₀·A₀ is the best approximation of a weight.

    PiSSA (Meng et al. 2024, section 3) takes that part out of the weight; here the weight stays,
    and the update takes it out.
    """
    rank = site.frozen
    u, s, v = _triplets(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), rank, config)
    root = (s[:rank] / site.scale).sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    return torch.cat([a, a]), torch.cat([b, -b], dim=1)


def _triplets(matrix: Tensor, rank: int, config: LoRAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, n), S (n,) and Vᵀ (n, d_in) with n ≥ rank, the largest singular values first."""
    if config.svd_iterations is None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    # Twice the rank, since the last singular vectors are the least exact.
    wide = min(2 * rank, *matrix.shape)
    u, s, v = torch.svd_lowrank(matrix, q=wide, niter=config.svd_iterations)
    return u, s, v.T
