"""One forward pass of GPT-2 medium's shape with each method: the paper's Table 1."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.attach import adapter_parameters, attach
from lorakit.bench.interleaved import Contestant, Seconds, interleaved
from lorakit.bench.result import OURS, BenchConfig, Findings, Goal
from lorakit.merge import merge
from lorakit.method_config import BottleneckConfig, LoRAConfig, MethodConfig
from lorakit.settings import DType, PositiveInt

PLAIN = "plain"
"""The contestant without any adapter, which a model that was trained in full is, too."""
PAPER_WIDTH, PAPER_BLOCKS, WIDTH_OF_A_HEAD = 1024, 24, 64
"""GPT-2 medium."""


class LatencyConfig(BenchConfig):
    """The paper's Table 1: GPT-2 medium's shape with random weights, without its output head."""

    model: Literal["gpt2-medium"] = "gpt2-medium"
    """Shape of the model, whose weights are random."""

    dtype: DType = "float32"
    """Precision of the base."""

    rank: PositiveInt = 4
    """Rank of LoRA on q and v, as the paper has it for GPT-2."""

    repeats: PositiveInt = 9
    """Turns that each contestant has; the paper has 100."""

    peer: Literal[False] = False
    """PEFT has no bottlenecks to compare with."""

    full: bool = False
    """The paper's depth and rows: 24 blocks; 32x512, 16x256 and 1x128 tokens. That takes a GPU, or
    a big machine and time."""

    blocks: PositiveInt = 4
    """Blocks of the model, where not `full`. A block's share of overhead does not depend on it."""

    shrink: PositiveInt = 16
    """What the paper's rows are divided by, where not `full`; a batch has one row at least."""

    width: PositiveInt = PAPER_WIDTH
    """Width of the model, a multiple of 64; the bottlenecks' sizes are in proportion."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One column of Table 1."""

    rows: int
    tokens: int
    """In each row."""
    sizes: Mapping[str, int]
    """Inner width by variant, so that the adapter has the paper's number of parameters."""
    paper: Mapping[str, float]
    """The paper's own overhead in per cent, by contestant."""


SETTINGS = (
    Setting(
        rows=32,
        tokens=512,
        sizes={"l": 9, "h": 5},  # 0.5M
        paper={"merged": 0.0, "adapter_l": 2.2, "adapter_h": 3.0},
    ),
    Setting(
        rows=16,
        tokens=256,
        sizes={"l": 224, "h": 112},  # 11M
        paper={"merged": 0.0, "adapter_l": 5.0, "adapter_h": 8.4},
    ),
    Setting(
        rows=1,
        tokens=128,
        sizes={"l": 224, "h": 112},
        paper={"merged": 0.0, "adapter_l": 20.7, "adapter_h": 30.3},
    ),
)


@torch.no_grad()
def measure_latency(settings: LatencyConfig) -> Findings:
    """Time a forward pass of each contestant in each setting of Table 1.

    Raises:
        ConfigError: the width is not a multiple of 64.
    """
    base = _base(settings)
    timings: dict[str, dict[str, Seconds]] = {}
    rows: list[dict[str, Any]] = []
    worst = 0.0
    for setting in SETTINGS:
        models, parameters = _models(base, setting, settings)
        ids = _ids(base, setting, settings)
        name = f"{ids.shape[0]}x{ids.shape[1]}"
        timings[name] = interleaved(
            {who: Contestant(run=_forward(model, ids)) for who, model in models.items()},
            repeats=settings.repeats,
        )
        rows += _rows(name, setting, timings[name], parameters)
        worst = max(worst, _difference(models, ids))
    return Findings(
        timings=timings,
        goals=tuple(_goal(name, each) for name, each in timings.items()),
        checks={"largest_difference_of_merged_from_unmerged": worst},
        tables={"latency": rows},
    )
