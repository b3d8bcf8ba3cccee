"""The verb demo: two tasks learned, mixed, switched, merged and undone on a real model."""

import itertools
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapter.output_place import check_place
from lorakit.answering.answer import answer
from lorakit.attachment.attach import detach
from lorakit.bank import AdapterBank
from lorakit.cli.verbs import Result
from lorakit.config.methods import LoRAConfig
from lorakit.config.train import DataConfig, TrainConfig
from lorakit.config.verbs import DemoConfig
from lorakit.data.encode import encode_prompt
from lorakit.data.metrics.basic import exact_match
from lorakit.data.row_types import PromptRow, references_of
from lorakit.data.rows import read_rows
from lorakit.errors import OutputError
from lorakit.merging.merge import merge, unmerge
from lorakit.models.identity import weights_hash
from lorakit.models.load import load_model
from lorakit.routing.route import switch
from lorakit.training.run import train
from lorakit.training.sweep.sweep import sweep

TASK_STEPS = {"places": 70, "sql": 40}
"""The tasks, and the number of training steps of each."""
MODEL = "smollm2"
SWEEP_RANKS = (1, 2, 4, 8)
SWEEP_STEPS = 8
SWEEP_ROWS = 2
"""Rows of each rank in a step."""
MIXED_ROWS = 8
"""Rows of the mixed batch; the tasks and the base take turns."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The scores of one task before and after training, and what the training took."""

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
class Mixed:
    """One batch in which each row has the adapter of its own task, or none."""

    adapters: tuple[str | None, ...]
    same_answers: bool
    """Whether every row was answered as in a batch of its own adapter's rows alone."""
    seconds: float
    base_seconds: float
    """Time of the base for the same rows and as many tokens."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One forward pass of a held-out batch, median of several."""

    base_ms: float
    unmerged_ms: float
    merged_ms: float
    switch_us: float
    """Time of an unmerged switch."""


def run(settings: DemoConfig) -> Result:
    """Train, reload, mix, switch, merge and unmerge, and prove that the base is unchanged."""
    started = time.perf_counter()
    out = _folder(settings.out)
    model, tokenizer = load_model(MODEL, dtype="float32")
    original = weights_hash(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _say(f"{MODEL}: {size / 1e6:.0f} MB; scoring the base on held-out rows")
    held_out = {task: _held_out(task, settings.rows) for task in TASK_STEPS}
    before = {task: _score(model, tokenizer, held_out[task])[0] for task in TASK_STEPS}
    trained = {}
    for task in TASK_STEPS:
        _say(f"training {task}")
        trained[task] = train(
            _training(task, settings, out), model=model, tokenizer=tokenizer, progress=True
        )
    _say(f"training {len(SWEEP_RANKS)} ranks of sql in one batch")
    swept = sweep(_sweep(settings, out), model=model, tokenizer=tokenizer, progress=True)
    _say("reloading the adapters into the base, scoring, mixing, merging, unmerging")
    bank = AdapterBank(model)
    results = []
    for task in TASK_STEPS:
        bank.load(task, out / task)
        bank.switch(task)
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
    mixed = _mix(bank, model, tokenizer, held_out)
    batch = _batch(tokenizer, held_out[next(iter(TASK_STEPS))])
    timing, logit_change = _merge_and_undo(model, batch)
    detach(model)
    unchanged = weights_hash(model) == original
    data = {
        "tasks": [asdict(result) for result in results],
        "model_bytes": size,
        "mixed": asdict(mixed),
        "sweep": {
            name: {"parameters": run.parameters, "validation_loss": run.scores["loss"]}
            for name, run in swept.finished.items()
        },
        "sweep_seconds": swept.seconds,
        "timing": asdict(timing),
        "largest_logit_change_of_merging": logit_change,
        "base_unchanged": unchanged,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    assert unchanged, "the base has changed"
    return Result(text=_report(results, data, timing, mixed), data=data)


def _folder(asked: Path | None) -> Path:
    if asked is None:
        return Path(tempfile.mkdtemp(prefix="lorakit-demo-"))
    check_place(asked, "the demo writes a folder")
    if asked.exists() and any(asked.iterdir()):
        raise OutputError(f"{asked} exists and is not empty: choose another folder")
    return asked


def _training(task: str, settings: DemoConfig, out: Path) -> TrainConfig:
    return TrainConfig(
        out=out / task,
        lora=LoRAConfig(rank=8, alpha=16, targets=("q", "v")),
        data=DataConfig(train=f"builtin:{task}"),
        steps=settings.steps or TASK_STEPS[task],
        batch_size=settings.batch_size,
        learning_rate=3e-3,
        warmup_steps=min(5, (settings.steps or TASK_STEPS[task]) // 2),
    )


def _sweep(settings: DemoConfig, out: Path) -> TrainConfig:
    """The settings of a sweep of some ranks, too short for any to learn its task."""
    steps = min(SWEEP_STEPS, settings.steps or SWEEP_STEPS)
    return TrainConfig(
        out=out / "ranks",
        lora=LoRAConfig(targets=("q", "v")),
        data=DataConfig(
            train="builtin:sql", validation="builtin:sql:validation", validation_rows=16
        ),
        sweep={"lora.rank": list(SWEEP_RANKS)},
        steps=steps,
        batch_size=SWEEP_ROWS,
        learning_rate=3e-3,
        warmup_steps=min(3, steps // 2),
        eval_every=steps,
        check_after=3,
    )


def _held_out(task: str, count: int) -> Sequence[PromptRow]:
    rows = read_rows(f"builtin:{task}", DataConfig(), limit=count, split="test").rows
    return [row for row in rows if isinstance(row, PromptRow)]


def _score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
) -> tuple[float, str]:
    """The share of rows that are answered exactly, from 0 to 1, and one example."""
    prompts = [encode_prompt(row, tokenizer, DataConfig()) for row in rows]
    answers = answer(model, tokenizer, prompts, max_new_tokens=48, batch_size=32, note=_say)
    example = f"{rows[0].prompt}\n  -> {answers[0].splitlines()[0] if answers[0] else ''}"
    return exact_match(answers, [references_of(row) for row in rows]), example


def _mix(
    bank: AdapterBank,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Mapping[str, Sequence[PromptRow]],
) -> Mixed:
    """Generate answers for one batch with an adapter per row, and for each adapter's rows alone."""
    turns = [task for _, task in zip(range(MIXED_ROWS), itertools.cycle([*TASK_STEPS, None]))]
    source = {task: itertools.cycle(held_out[task or "places"]) for task in turns}
    rows = [next(source[task]) for task in turns]
    prompts = [encode_prompt(row, tokenizer, DataConfig()) for row in rows]

    def ask(route: Any, asked: Sequence[Sequence[int]]) -> tuple[list[str], float]:
        begun = time.perf_counter()
        with bank.route(route):
            answers = answer(model, tokenizer, asked, max_new_tokens=24, note=_say)
        return answers, time.perf_counter() - begun

    together, seconds = ask(turns, prompts)
    base_seconds = ask(None, prompts)[1]
    same = True
    for task in dict.fromkeys(turns):
        mine = [row for row, chosen in enumerate(turns) if chosen == task]
        alone, _ = ask(task, [prompts[row] for row in mine])
        same &= alone == [together[row] for row in mine]
    return Mixed(
        adapters=tuple(turns), same_answers=same, seconds=seconds, base_seconds=base_seconds
    )


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
    first, second = TASK_STEPS
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


def _report(
    results: Sequence[TaskResult], data: dict[str, Any], timing: Timing, mixed: Mixed
) -> str:
    size = data["model_bytes"]
    lines = ["task      before   after   adapter        model     training"]
    lines += [
        f"{r.task:8}  {r.before:6.0%}  {r.after:6.0%}  {r.adapter_bytes / 1e6:6.1f} MB"
        f"  {size / 1e6:8.0f} MB  {r.seconds:7.0f} s"
        for r in results
    ]
    ranks = ", ".join(f"{n} {m['validation_loss']:.2f}" for n, m in data["sweep"].items())
    examples = [line for r in results for line in r.example.splitlines()]
    out = data["out"]
    return "\n".join(
        [
            *examples,
            "",
            *lines,
            "",
            f"{len(data['sweep'])} ranks trained in one batch ({data['sweep_seconds']:.0f} s), "
            f"validation loss: {ranks}",
            f"one batch of {len(mixed.adapters)} rows with {len(TASK_STEPS)} adapters and the base:"
            f" {mixed.seconds:.1f} s (the base alone {mixed.base_seconds:.1f} s), each row "
            + ("answered as alone" if mixed.same_answers else "NOT ANSWERED AS ALONE"),
            f"one prompt: base {timing.base_ms:.1f} ms, unmerged {timing.unmerged_ms:.1f} ms, "
            f"merged {timing.merged_ms:.1f} ms; a switch takes {timing.switch_us:.1f} us",
            f"largest change of a logit by merging: {data['largest_logit_change_of_merging']:.2g}",
            f"after {len(TASK_STEPS)} adapters, switches, merges: the base's bits are unchanged",
            f"{data['seconds']:.0f} s in all. Next:",
            f'  lorakit generate --adapter {out}/places --prompt "name: Ivory Mill, kind: library, '
            'area: harbour, cost: high, dogs: yes"',
            f"  lorakit evaluate --adapter {out}/sql --data.validation builtin:sql:test",
            f"  lorakit merge --adapter {out}/places --out {out}/places-merged",
        ]
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
