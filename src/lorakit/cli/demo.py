"""The verb demo: two tasks learned, switched, merged and undone on a real model, in minutes."""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter import Adapter
from lorakit.attach import attach, detach
from lorakit.cli.verbs import Result
from lorakit.config import DataConfig, LoRAConfig, PositiveInt, Settings, TrainConfig
from lorakit.errors import OutputError
from lorakit.merge import merge, unmerge
from lorakit.models.identity import weights_hash
from lorakit.models.load import load_model
from lorakit.routing import switch
from lorakit.tasks.encode import encode_prompt
from lorakit.tasks.kinds import PromptRow, references_of
from lorakit.tasks.metrics import exact_match
from lorakit.tasks.rows import read_rows
from lorakit.train.evaluation import answer
from lorakit.train.run import train

TASKS = {"places": 70, "sql": 30}
"""The tasks, and the steps after which each is learned."""
MODEL = "smollm2"


class DemoConfig(Settings):
    """How long to train and how much to score."""

    out: Path | None = None
    """New folder for the adapters. None: a temporary one, which stays for you to look at."""

    steps: PositiveInt | None = None
    """Optimizer steps per task. None: as many as each task needs."""

    rows: PositiveInt = 32
    """Held-out rows scored per task."""

    batch_size: PositiveInt = 8
    """Rows per step."""


SETTINGS: type[Settings] = DemoConfig


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task gained."""

    task: str
    before: float
    """Share of held-out rows that the base answers exactly."""
    after: float
    """The same with the adapter, reloaded from its folder."""
    adapter_bytes: int
    parameters: int
    seconds: float
    """Time of the training loop."""
    example: str
    """One held-out prompt and the adapter's answer."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One forward pass of a held-out batch, median of several."""

    base_ms: float
    unmerged_ms: float
    merged_ms: float
    switch_us: float
    """Time of an unmerged switch."""


def run(settings: DemoConfig) -> Result:
    """Train, reload, switch, merge and unmerge, and prove that the base is unchanged."""
    started = time.perf_counter()
    out = _folder(settings.out)
    model, tokenizer = load_model(MODEL, dtype="float32")
    original = weights_hash(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _say(f"{MODEL}: {size / 1e6:.0f} MB; scoring the base on held-out rows")
    held_out = {task: _held_out(task, settings.rows) for task in TASKS}
    before = {task: _score(model, tokenizer, held_out[task])[0] for task in TASKS}
    trained = {}
    for task in TASKS:
        _say(f"training {task}")
        trained[task] = train(_training(task, settings, out), progress=True)
    _say("reloading both adapters into the base, scoring, merging, unmerging")
    for task in TASKS:
        attach(model, Adapter.load(out / task), name=task)
    results = []
    for task in TASKS:
        switch(model, task)
        after, example = _score(model, tokenizer, held_out[task])
        results.append(
            TaskResult(
                task=task,
                before=before[task],
                after=after,
                adapter_bytes=_folder_bytes(out / task),
                parameters=trained[task].parameters,
                seconds=trained[task].seconds,
                example=example,
            )
        )
    batch = _batch(tokenizer, held_out[next(iter(TASKS))])
    timing, logit_change = _merge_and_undo(model, batch)
    detach(model)
    unchanged = weights_hash(model) == original
    data = {
        "tasks": [asdict(result) for result in results],
        "model_bytes": size,
        "timing": asdict(timing),
        "largest_logit_change_of_merging": logit_change,
        "base_unchanged": unchanged,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    assert unchanged, "the base has changed"
    return Result(text=_report(results, size, data, timing), data=data)


def _folder(asked: Path | None) -> Path:
    if asked is None:
        return Path(tempfile.mkdtemp(prefix="lorakit-demo-"))
    if asked.exists() and any(asked.iterdir()):
        raise OutputError(f"{asked} exists and is not empty: choose another folder")
    return asked


def _training(task: str, settings: DemoConfig, out: Path) -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        out=out / task,
        lora=LoRAConfig(rank=8, alpha=16, targets=("q", "v")),
        data=DataConfig(train=f"builtin:{task}"),
        steps=settings.steps or TASKS[task],
        batch_size=settings.batch_size,
        learning_rate=3e-3,
        warmup_steps=min(5, (settings.steps or TASKS[task]) // 2),
        dtype="bfloat16",
    )


def _held_out(task: str, count: int) -> Sequence[PromptRow]:
    rows = read_rows(f"builtin:{task}", DataConfig(), limit=count, split="test").rows
    return [row for row in rows if isinstance(row, PromptRow)]


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
) -> tuple[float, str]:
    """Return the share of exact answers, and one example."""
    prompts = [encode_prompt(row, tokenizer, DataConfig()) for row in rows]
    answers = answer(model, tokenizer, prompts, max_new_tokens=48, batch_size=32)
    example = f"{rows[0].prompt}\n  -> {answers[0].splitlines()[0] if answers[0] else ''}"
    return exact_match(answers, [references_of(row) for row in rows]), example


def _batch(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
) -> dict[str, torch.Tensor]:
    ids = encode_prompt(rows[0], tokenizer, DataConfig())
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}


@torch.no_grad()
def _merge_and_undo(
    model: PreTrainedModel, batch: dict[str, torch.Tensor]
) -> tuple[Timing, float | None]:
    """Time a forward pass of the base, the unmerged and the merged model, in turns."""
    first, second = TASKS
    switches = []
    for name in (first, second) * 50:
        begun = time.perf_counter()
        switch(model, name)
        switches.append(time.perf_counter() - begun)
    times: dict[str, list[float]] = {"base": [], "unmerged": [], "merged": []}
    change = None
    for _ in range(3):
        switch(model, None)
        times["base"] += _forward_times(model, batch)
        switch(model, first)
        times["unmerged"] += _forward_times(model, batch)
        change = merge(model, first, probe=batch).logit_change
        times["merged"] += _forward_times(model, batch)
        unmerge(model)
    middle = {way: sorted(values)[len(values) // 2] * 1e3 for way, values in times.items()}
    return (
        Timing(
            base_ms=middle["base"],
            unmerged_ms=middle["unmerged"],
            merged_ms=middle["merged"],
            switch_us=sorted(switches)[len(switches) // 2] * 1e6,
        ),
        change,
    )


def _forward_times(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[float]:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - begun)
    return times


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors")


def _report(results: Sequence[TaskResult], size: int, data: dict[str, Any], timing: Timing) -> str:
    lines = ["task      before   after   adapter        model     training"]
    lines += [
        f"{r.task:8}  {r.before:6.0%}  {r.after:6.0%}  {r.adapter_bytes / 1e6:6.1f} MB"
        f"  {size / 1e6:8.0f} MB  {r.seconds:7.0f} s"
        for r in results
    ]
    examples = [line for r in results for line in r.example.splitlines()]
    out = data["out"]
    return "\n".join(
        [
            *examples,
            "",
            *lines,
            "",
            f"one prompt: base {timing.base_ms:.1f} ms, unmerged {timing.unmerged_ms:.1f} ms, "
            f"merged {timing.merged_ms:.1f} ms; a switch takes {timing.switch_us:.1f} us",
            f"largest change of a logit by merging: {data['largest_logit_change_of_merging']:.2g}",
            f"after {len(TASKS)} adapters, switches, merges: the base's bits are unchanged",
            f"{data['seconds']:.0f} s in all. Next:",
            f'  lorakit generate --adapter {out}/places --prompt "name: Ivory Mill, kind: library, '
            'area: harbour, cost: high, dogs: yes"',
            f"  lorakit evaluate --adapter {out}/sql --data.validation builtin:sql:test",
            f"  lorakit merge --adapter {out}/places --out {out}/places-merged",
        ]
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
