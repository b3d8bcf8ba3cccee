"""A first adapter: train it, see where it changes the model, and what a merge would cost.

Run it from a checkout: `python examples/first_adapter.py` (a few minutes on two cores). It
leaves the adapter and a picture in out/first_adapter.
"""

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

import lorakit as lk

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def story(out: Path, *, model: str = "smollm2", steps: int = 70, rows: int = 32) -> Path:
    """Train an adapter in a new folder, and draw what it is; returns the picture."""
    # The task: say in a sentence what a list of attributes says. Its rows are made by a grammar;
    # yours would be a file: DataConfig(train="mine.jsonl", validation="held_out.jsonl").
    data = lk.DataConfig(
        train="builtin:places", validation="builtin:places:validation", validation_rows=rows
    )
    config = lk.TrainConfig(
        out=out / "adapter",
        lora=lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"]),
        data=data,
        steps=steps,
        learning_rate=3e-3,
        warmup_steps=min(5, steps // 2),
        eval_every=max(1, steps // 7),
    )
    base, tokenizer = lk.load_model(model)
    run = lk.train(config, model=base, tokenizer=tokenizer)
    print(f"{run.parameters:,} trained values, loss {run.first_loss:.2f} → {run.last_loss:.2f}")

    # The adapter is all that a task takes: a few megabytes beside the base, which is unchanged.
    adapter = run.adapter
    prompt = "name: Ivory Mill, kind: library, area: harbour, cost: high, dogs: yes"
    (before,) = lk.generate(prompt, model=base, tokenizer=tokenizer, max_new_tokens=30, chat=False)
    (after,) = lk.generate(
        prompt, model=base, tokenizer=tokenizer, adapter=adapter, max_new_tokens=30
    )
    print(f"{prompt}\n  the base:    {before!r}\n  the adapter: {after!r}")

    # A merge adds scale·B·A to the weights. Each precision keeps another share of it.
    reports = {}
    with lk.attached(base, adapter):
        for name, precision in PRECISIONS.items():
            with lk.merged(base, round_to=precision) as reports[name]:
                pass  # here the model has no adapter to compute, and no latency
            lost = 100 * reports[name].rounding_error
            print(f"merged in {name}: rounding takes at most {lost:.2g} % of the update")
    return _draw(out / "first_adapter.png", run.out / "log.jsonl", reports)


def _draw(picture: Path, log: Path, reports: dict[str, lk.MergeReport]) -> Path:
    figure = Figure(figsize=(11, 3.4), dpi=100, layout="constrained")
    losses, changes, rounding = figure.subplots(1, 3, width_ratios=(1, 1.2, 1))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # The log has the mean of ten steps, so that held-out rows, scored after them, lie below it.
    curves = (("loss", "training, mean of 10 steps", "-"), ("eval_loss", "held-out rows", "o"))
    for key, label, style in curves:
        points = [(line["step"], line[key]) for line in lines if key in line]
        losses.plot(*zip(*points, strict=True), style, label=label)
    losses.set(title="It learns", xlabel="step", ylabel="loss (nats per token)", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    losses.legend(frameon=False)

    sizes: dict[str, list[float]] = {"q": [], "v": []}
    for weight in reports["float32"].weights:
        sizes["q" if ".q_proj." in weight.name else "v"].append(weight.relative_update)
    for (role, values), offset in zip(sizes.items(), (-0.2, 0.2), strict=True):
        blocks = [block + offset for block in range(len(values))]
        changes.bar(blocks, [100 * value for value in values], width=0.4, label=role)
    changes.set(title="Where it changes the model", xlabel="block", ylabel="‖ΔW‖/‖W‖ in %")
    changes.legend(frameon=False)

    lost = [100 * report.rounding_error for report in reports.values()]
    bars = rounding.bar(list(reports), lost, color=["#2a9d8f", "#e9c46a", "#e76f51"])
    rounding.bar_label(bars, fmt="%.2g %%")
    rounding.set(title="What a merge loses", ylabel="% of the update, at most", yscale="log")
    rounding.margins(y=0.1)
    rounding.yaxis.set_major_formatter("{x:g}")
    for axes in (losses, changes, rounding):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
    return picture


if __name__ == "__main__":
    print(story(Path("out/first_adapter")))
