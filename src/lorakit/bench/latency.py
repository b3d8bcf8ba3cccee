"""One forward pass of GPT-2 medium's shape with each method: the paper's Table 1."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from lorakit.attachment.attach import adapter_parameters, attach
from lorakit.bench.result import OURS, Findings, Goal, Measured
from lorakit.bench.rounds import Contestant, Seconds, interleaved
from lorakit.config.base import DType, PositiveInt
from lorakit.config.methods import BottleneckConfig, LoRAConfig, MethodConfig
from lorakit.merging.merge import merge

PLAIN = "plain"
"""The contestant without an adapter, as a model that was trained in full is."""
LABELS = {
    PLAIN: "full fine-tuning, or the base",
    OURS: "LoRA, merged",
    "unmerged": "LoRA, unmerged",
    "adapter_l": "Adapter^L",
    "adapter_h": "Adapter^H",
}
"""The contestants in the order of their turns, and what the table calls them."""
WIDTH, BLOCKS, HEAD_WIDTH = 1024, 24, 64
"""GPT-2 medium's: of the model, of its stack, of one head of attention."""
NOISE_PERCENT = 1.0
"""What a merged adapter may differ from the plain model: they run the same operations."""


class LatencyConfig(Measured):
    """The paper's Table 1, on random weights; the output head, the same for all, is left out."""

    model: Literal["gpt2-medium"] = "gpt2-medium"
    """Shape of the model, whose weights are random."""

    dtype: DType = "float32"
    """Precision of the base."""

    rank: PositiveInt = 4
    """Rank of LoRA on q and v, the paper's for GPT-2."""

    adapter_dtype: DType = "float32"
    """Precision of A, B and the bottlenecks."""

    repeats: PositiveInt = 20
    """Turns that each contestant has; the paper's figures are means of 100."""

    full: bool = False
    """The paper's 24 blocks and rows (32x512, 16x256 and 1x128 tokens), for a GPU or a large
    machine."""

    blocks: PositiveInt = 4
    """Blocks, where not `full`: all of them are alike, so overheads in per cent stay as they
    are."""

    shrink: PositiveInt = 8
    """Where not `full`: what the paper's numbers of rows are divided by; one row is left."""

    width: PositiveInt = WIDTH
    """Width of the model, a multiple of 64; the bottlenecks' sizes are in proportion."""

    @model_validator(mode="after")
    def _check(self) -> LatencyConfig:
        if self.width % HEAD_WIDTH:
            raise ValueError(f"width {self.width} is not a multiple of {HEAD_WIDTH}")
        return self


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One column of Table 1."""

    rows: int
    tokens: int
    """In each row."""
    size_l: int
    """Inner width with which Adapter^L has the column's number of parameters."""
    size_h: int
    """The same of Adapter^H."""
    paper: Mapping[str, float]
    """The paper's overhead in per cent, by contestant."""

    def shape(self, settings: LatencyConfig) -> tuple[int, int]:
        """Return rows and tokens, smaller where asked."""
        rows = self.rows if settings.full else max(1, self.rows // settings.shrink)
        return rows, self.tokens

    def methods(self, settings: LatencyConfig) -> dict[str, MethodConfig]:
        """The settings of each contestant's adapter."""
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
    """Time a forward pass of each contestant in each column of Table 1."""
    base = _base(settings)
    columns = [_measured(base, setting, settings) for setting in SETTINGS]
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
class Column:
    """What was measured in one setting."""

    name: str
    """Rows x tokens."""
    setting: Setting
    seconds: Mapping[str, Seconds]
    parameters: Mapping[str, int]
    """Values of each contestant's adapter."""
    difference: float
    """The largest one between hidden states of merged and unmerged LoRA."""

    def table(self) -> Iterator[dict[str, Any]]:
        """Yield a line for each contestant."""
        for who, seconds in self.seconds.items():
            mine = overhead_percent(seconds, self.seconds[PLAIN])
            yield {
                "rows x tokens": self.name,
                "who": LABELS[who],
                "parameters": self.parameters.get(who),
                "mean_s": statistics.mean(seconds.turns),
                "deviation_s": statistics.pstdev(seconds.turns),
                "overhead_percent": None if who == PLAIN else mine,
                "overhead in the paper_percent": self.setting.paper.get(who),
            }


def overhead_percent(seconds: Seconds, plain: Seconds) -> float:
    """Return how much longer something takes than the plain model, in per cent.

    The median over turns, each compared with the plain model's turn beside it.
    """
    ratios = (own / other for own, other in zip(seconds.turns, plain.turns, strict=True))
    return 100 * (statistics.median(ratios) - 1)


@torch.no_grad()
def _measured(base: Any, setting: Setting, settings: LatencyConfig) -> Column:
    # A copy as the others are: where weights lie in memory has its own small effect.
    models, parameters = {PLAIN: _copy(base)}, {}
    for who, config in setting.methods(settings).items():
        models[who], parameters[who] = _adapted(base, config)
    merge(models[OURS], measure=False)
    rows, tokens = setting.shape(settings)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (rows, tokens), generator=draw).to(base.device)
    passes = {who: _forward(models[who], ids) for who in LABELS}
    turns = {who: Contestant(run=run) for who, run in passes.items()}
    return Column(
        name=f"{rows}x{tokens}",
        setting=setting,
        seconds=interleaved(turns, repeats=settings.repeats, there_and_back=True),
        parameters=parameters,
        difference=(passes[OURS]() - passes["unmerged"]()).abs().max().item(),
    )


def _base(settings: LatencyConfig) -> Any:
    """Return GPT-2 without its head, on the GPU if there is one, with random weights."""
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
    draw = torch.Generator().manual_seed(0)
    for _, tensor in adapter_parameters(model, "default"):
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.02)
    return model, parameters


def _copy(base: Any) -> nn.Module:
    """A copy whose embedding, which nobody changes, is the base's own."""
    model: nn.Module = copy.deepcopy(base, {id(base.wte): base.wte})
    return model


def _forward(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    """Return what runs a model to the end, also on a GPU, and returns its hidden states."""

    @torch.no_grad()
    def run() -> Tensor:
        states: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        if ids.is_cuda:
            torch.cuda.synchronize()
        return states

    return run
