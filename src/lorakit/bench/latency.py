"""A forward pass of GPT-2 medium's blocks with each method: the paper's Table 1."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.attachment.attach import adapter_parameters, attach
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Participant, Seconds, interleaved
from lorakit.config.bench import HEAD_WIDTH, WIDTH, LatencyConfig
from lorakit.config.methods import BottleneckConfig, LoRAConfig, MethodConfig
from lorakit.merging.merge import merge

PLAIN = "plain"
"""The baseline without an adapter, which is also what a fully fine-tuned model costs."""
LABELS = {
    PLAIN: "full fine-tuning, or the base",
    OURS: "LoRA, merged",
    "unmerged": "LoRA, unmerged",
    "adapter_l": "Adapter^L",
    "adapter_h": "Adapter^H",
}
"""The participants in the order of a round, and their names in the table."""
BLOCKS = 24
"""The number of GPT-2 medium's blocks."""
NOISE_PERCENT = 1.0
"""The difference between a merged adapter and the plain model, same operations, that is noise."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One column of Table 1."""

    rows: int
    tokens: int
    """In each row."""
    size_l: int
    """Inner width of Adapter^L that gives the column's number of parameters."""
    size_h: int
    """Inner width of Adapter^H that does."""
    paper: Mapping[str, float]
    """The paper's overhead in per cent, by participant."""

    def shape(self, settings: LatencyConfig) -> tuple[int, int]:
        """Rows, which `shrink` divides, and tokens."""
        rows = self.rows if settings.full else max(1, self.rows // settings.shrink)
        return rows, self.tokens

    def methods(self, settings: LatencyConfig) -> dict[str, MethodConfig]:
        """The settings of each participant's adapter."""
        lora = LoRAConfig(rank=settings.rank, dtype=settings.adapter_dtype)
        return {
            OURS: lora,
            "unmerged": lora,
            "adapter_l": _bottleneck("l", self.size_l, settings),
            "adapter_h": _bottleneck("h", self.size_h, settings),
        }


SETTINGS = (
    # 0.5M parameters
    Setting(
        rows=32,
        tokens=512,
        size_l=9,
        size_h=5,
        paper={OURS: 0.0, "adapter_l": 2.2, "adapter_h": 3.0},
    ),
    # 11M parameters
    Setting(
        rows=16,
        tokens=256,
        size_l=224,
        size_h=112,
        paper={OURS: 0.0, "adapter_l": 5.0, "adapter_h": 8.4},
    ),
    Setting(
        rows=1,
        tokens=128,
        size_l=224,
        size_h=112,
        paper={OURS: 0.0, "adapter_l": 20.7, "adapter_h": 30.3},
    ),
)


def measure_latency(settings: LatencyConfig) -> Findings:
    """Time a forward pass of each participant in each column of Table 1."""
    base = _base(settings)
    columns = [_measure_column(base, setting, settings) for setting in SETTINGS]
    timings = {column.name: column.seconds for column in columns}
    return Findings(
        timings=timings,
        goals=tuple(
            Goal(
                what=f"merged LoRA beside the plain model, {name}",
                got=abs(overhead_percent(each[OURS], each[PLAIN])),
                limit=NOISE_PERCENT,
                unit="%",
            )
            for name, each in timings.items()
        ),
        tables={"latency": [row for column in columns for row in column.table()]},
        checks={
            "blocks": len(base.h),
            "merged_differs_from_unmerged_by": max(column.difference for column in columns),
        },
    )


@dataclass(frozen=True, kw_only=True)
class LatencyColumn:
    """The measurements of one setting."""

    name: str
    """Rows x tokens."""
    setting: Setting
    seconds: Mapping[str, Seconds]
    parameters: Mapping[str, int]
    """Number of parameters of each participant's adapter."""
    difference: float
    """The largest difference between the hidden states of merged and unmerged LoRA."""

    def table(self) -> Iterator[dict[str, Any]]:
        """The row of each participant."""
        for who, seconds in self.seconds.items():
            mine = overhead_percent(seconds, self.seconds[PLAIN])
            yield {
                "rows x tokens": self.name,
                "who": LABELS[who],
                "parameters": self.parameters.get(who),
                "mean_s": statistics.mean(seconds.rounds),
                "deviation_s": statistics.pstdev(seconds.rounds),
                "overhead_percent": None if who == PLAIN else mine,
                "overhead in the paper_percent": self.setting.paper.get(who),
            }


def overhead_percent(seconds: Seconds, plain: Seconds) -> float:
    """The overhead over the plain model in per cent, the median over the rounds.

    Each time is compared with the plain model's of the same round.
    """
    ratios = (own / other for own, other in zip(seconds.rounds, plain.rounds, strict=True))
    return 100 * (statistics.median(ratios) - 1)


@torch.no_grad()
def _measure_column(base: Any, setting: Setting, settings: LatencyConfig) -> LatencyColumn:
    # A copy, like the others: the position of weights in memory has a small effect of its own.
    models, parameters = {PLAIN: _copy(base)}, {}
    for who, config in setting.methods(settings).items():
        models[who], parameters[who] = _adapted(base, config)
    merge(models[OURS], measure=False)
    rows, tokens = setting.shape(settings)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (rows, tokens), generator=generator).to(base.device)
    passes = {who: _forward(models[who], ids) for who in LABELS}
    participants = {who: Participant(run=run) for who, run in passes.items()}
    return LatencyColumn(
        name=f"{rows}x{tokens}",
        setting=setting,
        seconds=interleaved(participants, repeats=settings.repeats, there_and_back=True),
        parameters=parameters,
        difference=(passes[OURS]() - passes["unmerged"]()).abs().max().item(),
    )


def _base(settings: LatencyConfig) -> Any:
    """GPT-2 without its head, with random weights, on the GPU if there is one."""
    # Imported late: `import lorakit` loads no model's code.
    from transformers import GPT2Config, GPT2Model

    shape = GPT2Config(
        n_embd=settings.width,
        n_head=settings.width // HEAD_WIDTH,
        n_layer=BLOCKS if settings.full else settings.blocks,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2Model(shape).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, getattr(torch, settings.dtype))


def _bottleneck(variant: Literal["h", "l"], size: int, settings: LatencyConfig) -> BottleneckConfig:
    in_proportion = max(1, size * settings.width // WIDTH)
    return BottleneckConfig(variant=variant, size=in_proportion, dtype=settings.adapter_dtype)


def _adapted(base: Any, config: MethodConfig) -> tuple[nn.Module, int]:
    """A copy with an adapter of random weights, and the number of these."""
    model = _copy(base)
    parameters = attach(model, config, trainable=False).parameters
    generator = torch.Generator().manual_seed(0)
    for _, tensor in adapter_parameters(model, "default"):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return model, parameters


def _copy(base: Any) -> nn.Module:
    """A copy that shares the base's embedding, which no participant changes."""
    model: nn.Module = copy.deepcopy(base, {id(base.wte): base.wte})
    return model


def _forward(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """A function that runs the model, waits for a GPU to finish, and returns the hidden states."""

    @torch.no_grad()
    def run() -> Tensor:
        states: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        if ids.is_cuda:
            torch.cuda.synchronize()
        return states

    return run
