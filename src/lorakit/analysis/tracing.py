"""Training traces: how ΔW grew and turned, over the checkpoints of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapter.adapter import Adapter
from lorakit.analysis.checks import check_low_rank
from lorakit.analysis.spectra import Spectrum, spectrum
from lorakit.analysis.subspaces import subspace_similarity
from lorakit.errors import AnalysisError
from lorakit.training.checkpoints import list_checkpoints, step_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """An adapter at one step of its training."""

    step: int
    spectra: Mapping[str, Spectrum]
    """By the site's name: norms and effective ranks are theirs."""
    similarity: Mapping[str, Tensor]
    """φ(i, j) of A's directions then and in the last trace (Eq. 4), by the site's name."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "step": self.step,
            "spectra": {name: found.to_json() for name, found in self.spectra.items()},
            "similarity": {name: phi.tolist() for name, phi in self.similarity.items()},
        }


def traces(folder: str | os.PathLike[str]) -> tuple[Trace, ...]:
    """The adapter of a training run at each checkpoint that is kept, by step; the last is final.

    Args:
        folder: that of a run: checkpoints are read from `checkpoints/checkpoint-STEP` (lorakit) or
            `checkpoint-STEP` (Trainer with PEFT), and `last` or the newest checkpoint is the end.
            `lorakit train` keeps the newest two, or with `keep_checkpoints` more.

    Raises:
        AnalysisError: there is no checkpoint, or the adapters have no A and B.
        AdapterFileError: the files of one cannot be used.

    Examples:
        >>> done = lk.train(lk.TrainConfig(
        ...     model="smollm2", out="out/traced", steps=4, save_every=2,
        ...     data=lk.DataConfig(train="builtin:places:train", train_rows=8)))
        >>> [trace.step for trace in lk.analysis.traces("out/traced")]
        [2, 4]
    """
    found = list(_adapters(Path(folder)))
    if not found:
        raise AnalysisError(f"{folder} has no checkpoints: give the folder of a training run")
    check_low_rank([adapter for _, adapter in found], what="a training trace")
    _, final = found[-1]
    return tuple(
        Trace(step=step, spectra=spectrum(adapter), similarity=subspace_similarity(adapter, final))
        for step, adapter in found
    )


def _adapters(folder: Path) -> Iterator[tuple[int, Adapter]]:
    """The step and the adapter of each checkpoint, and of the end where that is later."""
    checkpoints = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
    newest = -1
    for checkpoint in checkpoints:
        newest = step_of(checkpoint)
        yield newest, Adapter.load(checkpoint)
    if (folder / "last").is_dir():
        last = Adapter.load(folder / "last")
        step = last.card.get("step")
        if isinstance(step, int) and step > newest:
            yield step, last
