"""Telling one base model from another by a sketch of its weights."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.models.base import base_modules, base_parameters
from lorakit.models.paths import is_within
from lorakit.models.quantized_weight import is_quantized
from lorakit.upstream.private_names import loaded_from

SAMPLES_PER_TENSOR = 8


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """The sketch of a base that an adapter keeps, to recognise the base that it was trained on."""

    name: str
    """Name, folder or hub id by which the base was loaded."""
    architecture: str
    """transformers' model type, or the class name of another module."""
    dtype: str
    """Precision of the base's weights when the sketch was taken."""
    tensors: int
    """Number of parameters sampled."""
    names_hash: str
    """SHA-256 of the parameters' names and shapes."""
    samples: str
    """Base64 of eight float32 values (little endian) of each parameter, in order of name; NaN where
    only a quantised form was known."""

    @property
    def content_hash(self) -> str:
        """SHA-256 of the sketch: of names, shapes and sampled weights."""
        return hashlib.sha256(f"{self.names_hash} {self.samples}".encode()).hexdigest()

    def difference(self, other: BaseIdentity) -> str | None:
        """How two bases differ, in words, or None where they are the same base.

        A base in another precision is the same base: one side's samples are then the other's,
        rounded. Of weights that are quantised on one side, only names and shapes are compared.
        """
        if self.names_hash != other.names_hash:
            return (
                f"its parameters have other names or shapes ({self.architecture}, {self.tensors} "
                f"tensors; here {other.architecture}, {other.tensors})"
            )
        ours, theirs = self._values(), other._values()
        if ours.shape != theirs.shape:
            return "its weight sketch is damaged"
        known = ~(ours.isnan() | theirs.isnan())
        ours, theirs = ours[known], theirs[known]
        if _same_weights(ours, theirs):
            return None
        unequal = (ours.bfloat16() != theirs.bfloat16()).float().mean().item()
        return f"{unequal:.0%} of the sampled weights differ"

    def _values(self) -> Tensor:
        raw = np.frombuffer(base64.b64decode(self.samples), dtype="<f4")
        return torch.from_numpy(raw.astype(np.float32))


def identify(
    model: nn.Module, *, name: str = "", skip: Collection[str] = ()
) -> BaseIdentity | None:
    """The identity of a model's weights, or None on the meta device.

    Args:
        model: the base, with no adapter merged.
        name: the name, folder or hub id by which the base was loaded.
        skip: paths of modules that are not part of the base: fresh task heads.
    """
    parameters = {
        path: parameter.detach()
        for path, parameter in sorted(base_parameters(model))
        if parameter.is_floating_point() and not is_within(path, skip)
    }
    if not parameters or any(p.is_meta for p in parameters.values()):
        return None
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    unknown = {n: w for n, w in _unknown_weights(model) if not is_within(n, skip)}
    parameters = dict(sorted((parameters | unknown).items()))
    shapes = "\n".join(f"{path} {tuple(p.shape)}" for path, p in parameters.items())
    samples = torch.cat([_sample(p) for p in parameters.values()]).numpy().astype("<f4")
    config = getattr(model, "config", None)
    return BaseIdentity(
        name=name or loaded_from(model),
        architecture=str(getattr(config, "model_type", type(model).__name__)),
        dtype=dtype,
        tensors=len(parameters),
        names_hash=hashlib.sha256(shapes.encode()).hexdigest(),
        samples=base64.b64encode(samples.tobytes()).decode(),
    )


def _unknown_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name of each quantised weight, with NaNs in the shape of the original weight."""
    for path, layer in base_modules(model):
        if is_quantized(layer):
            size = cast(int, layer.out_features), cast(int, layer.in_features)
            # transformers quantises Conv1D, too, and notes what the layer was.
            turned = getattr(layer, "source_cls", None) is Conv1D
            yield f"{path}.weight", torch.tensor(torch.nan).expand(size[::-1] if turned else size)


def _sample(parameter: Tensor) -> Tensor:
    """Eight float32 entries of a parameter, at positions that depend on its size alone."""
    count = parameter.numel()
    # Knuth's multiplicative hash spreads the positions over the whole tensor.
    positions = [(index * 2654435761 + 40503) % count for index in range(SAMPLES_PER_TENSOR)]
    flat = parameter.reshape(-1)
    return flat[torch.tensor(positions, device=flat.device)].float().cpu()


def _same_weights(ours: Tensor, theirs: Tensor) -> bool:
    if torch.equal(ours, theirs):
        return True
    for dtype in (torch.float16, torch.bfloat16):
        a, b = ours.to(dtype).float(), theirs.to(dtype).float()
        one_side_rounded = torch.equal(a, ours) or torch.equal(b, theirs)
        if one_side_rounded and torch.equal(a, b):
            return True
    return _both_rounded(ours, theirs) or _both_rounded(theirs, ours)


def _both_rounded(half: Tensor, brain: Tensor) -> bool:
    """Whether one side is a float16 and the other a bfloat16 copy of the same weights."""
    is_half = torch.equal(half.half().float(), half)
    is_brain = torch.equal(brain.bfloat16().float(), brain)
    if not (is_half and is_brain):
        return False
    # float16 has three bits more, so one sample in eight is half-way between two bfloat16s, where
    # rounding twice may differ by one step (2^-7) from rounding once. 2^-24: float16's least step.
    near = torch.allclose(half, brain, rtol=2**-7, atol=2**-24)
    return near and (half.bfloat16() == brain).float().mean().item() > 0.85


def weights_hash(model: nn.Module) -> str:
    """The SHA-256 of every bit of the base's parameters, their names and precisions."""
    digest = hashlib.sha256()
    for path, parameter in base_parameters(model):
        bits = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{path} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(bits.numpy().data)
    return digest.hexdigest()
