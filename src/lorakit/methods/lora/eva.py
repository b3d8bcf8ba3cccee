"""EVA: A starts as right singular vectors of the layer's inputs (Paischer et al. 2024).

The right singular vectors of the inputs X of some batches are the eigenvectors of XᵀX, which is a
sum over batches and has one size however many there are. Padding tokens are left out. The
eigenvalues are the variance that each vector explains, and say which layers need a higher rank.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter.site import Site, scale_of
from lorakit.errors import AttachError, TargetError


@dataclass(frozen=True)
class SingularVectors:
    """The right singular vectors of a layer's inputs, and how much of them each explains."""

    rows: Tensor
    """One vector a row, (d_in, d_in), the largest variance first."""
    shares: Tensor
    """The share of the whole variance of each, (d_in,); 0 where all inputs were zero."""


@torch.no_grad()
def input_singular_vectors(
    model: nn.Module,
    paths: Sequence[str],
    shared: Mapping[str, str],
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, SingularVectors]:
    """The right singular vectors of each layer's inputs, by its path.

    Args:
        model: the base, which answers without any adapter meanwhile.
        paths: linear layers.
        shared: a key for layers that may share their input, by path: those that are given the same
            tensor are summed once, and get equal vectors.
        batches: what the model takes; `attention_mask` (rows, length) says which tokens pad.

    Raises:
        AttachError: there is no batch.
        TargetError: a layer has read nothing of them.
    """
    first: dict[str, str] = {}
    for path in paths:
        first.setdefault(shared.get(path, path), path)
    sums = _Sums(model, {path: first[shared.get(path, path)] for path in paths})
    sums.add(model, batches)
    unread = [path for path in paths if path not in sums.summed_as]
    if unread:
        raise TargetError.listing("init eva looks at inputs, but layers have read nothing", unread)
    found = {path: _singular_vectors(total) for path, total in sums.of.items()}
    return {path: found[sums.summed_as[path]] for path in paths}


def _singular_vectors(total: Tensor) -> SingularVectors:
    values, vectors = torch.linalg.eigh(total)  # sorted upwards
    variances = values.flip(0).clamp_min(0)
    shares = variances / variances.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return SingularVectors(vectors.T.flip(0), shares)


def moved_ranks(
    sites: Sequence[Site],
    vectors: Mapping[str, SingularVectors],
    *,
    rho: float,
    use_rslora: bool = False,
) -> list[Site]:
    """The sites with as many ranks in all, moved to where they explain most (Paischer et al. 2024).

    Args:
        sites: updates, each with its rank.
        vectors: of each layer's inputs, by its path.
        rho: how many times its rank an update may get.
        use_rslora: whether scales are α/√r; each update keeps its scale, and α follows.
    """
    spare = [
        (-float(share), number)
        for number, site in enumerate(sites)
        for share in vectors[site.path].shares[1 : int(rho * site.rank)]
    ]
    ranks = Counter(range(len(sites)))  # one each, or the file would lack a layer of its targets
    ranks.update(number for _, number in sorted(spare)[: sum(s.rank for s in sites) - len(sites)])
    return [
        replace(
            site,
            rank=ranks[number],
            alpha=site.scale / scale_of(ranks[number], 1.0, use_rslora=use_rslora),
        )
        for number, site in enumerate(sites)
    ]


class _Sums:
    """XᵀX of the inputs of some layers, by path, in float32 at least."""

    def __init__(self, model: nn.Module, first: Mapping[str, str]) -> None:
        self.of: dict[str, Tensor] = {}
        self.summed_as: dict[str, str] = {}
        """In which sum the inputs of each layer are: its own, or that of a layer before it."""
        self._first = first
        self._read: dict[str, weakref.ref[Tensor]] = {}
        self._layers = {path: model.get_submodule(path) for path in first}
        self._mask: Tensor | None = None

    def add(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
        """Run the model on batches, in eval mode, and add what its layers read."""
        training, device, count = model.training, next(model.parameters()).device, 0
        hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, path=path: self._note(path, inputs))
            for path, layer in self._layers.items()
        ]
        try:
            model.eval()
            for batch in batches:
                count += 1
                tensors = {name: x.to(device) for name, x in batch.items() if name != "labels"}
                self._mask = tensors.get("attention_mask")
                model(**tensors)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        if not count:
            raise AttachError("init eva looks at data, and there is no batch in it")

    def _note(self, path: str, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        first, read = self._first[path], self._read.get(self._first[path])
        # In cross-attention, q reads something else than k and v.
        if first != path and read is not None and read() is x:
            self.summed_as[path] = first
            return
        self._read[path], self.summed_as[path] = weakref.ref(x), path
        mask, x = self._mask, x.reshape(-1, x.shape[-1])
        # By number and not by shape: OPT joins its rows before the MLP.
        if mask is not None and mask.numel() == len(x):
            x = x[mask.reshape(-1).bool()]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        self.of[path] = x.T @ x + self.of.get(path, 0)
