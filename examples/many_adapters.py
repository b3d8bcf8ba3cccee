"""Many adapters on one base: two tasks learnt apart, mixed in one batch and in one row.

Run it from a checkout: `python examples/many_adapters.py` (a few minutes on two cores). It
leaves the adapters and a picture in out/many_adapters.
"""

from pathlib import Path

from matplotlib.figure import Figure

import lorakit as lk

STEPS = {"places": 70, "sql": 30}
"""The tasks, and the number of steps that each needs."""
PROMPTS = {
    "places": "name: Ivory Mill, kind: library, area: harbour, cost: high, dogs: yes",
    "sql": "table ships: port, length, crew_size. What is the largest length?",
}


def story(
    out: Path, *, model: str = "smollm2", steps: int | None = None, rows: int = 16, points: int = 6
) -> Path:
    """Train two adapters in a new folder, and draw what is between them; returns the picture."""
    base, tokenizer = lk.load_model(model)
    for task, enough in STEPS.items():
        config = lk.TrainConfig(
            out=out / task,
            lora=lk.LoRAConfig(rank=8, alpha=16, targets=["q", "v"]),
            data=lk.DataConfig(train=f"builtin:{task}"),
            steps=steps or enough,
            learning_rate=3e-3,
            warmup_steps=min(5, (steps or enough) // 2),
        )
        run = lk.train(config, model=base, tokenizer=tokenizer)
        print(f"{task}: loss {run.first_loss:.2f} → {run.last_loss:.2f}")

    # One base in memory, and both adapters beside it, verified as they are loaded.
    bank = lk.AdapterBank(base)
    for task in STEPS:
        bank.load(task, out / task)
    megabytes = {"the base": sum(p.numel() * 4 for p in base.parameters()) / 1e6}
    megabytes["both adapters"] = bank.resident_bytes / 1e6
    print(", ".join(f"{what}: {size:.1f} MB" for what, size in megabytes.items()))

    # One batch in which each row has an adapter of its own, or none.
    tokenizer.padding_side = "left"
    mixed = {"places": "places", "sql": "sql", "base": None}
    prompts = [PROMPTS["places"], PROMPTS["sql"], "The sea"]
    batch = tokenizer([prompt + "\n" for prompt in prompts], return_tensors="pt", padding=True)
    with bank.route(list(mixed.values())):
        answers = base.generate(**batch, max_new_tokens=30, do_sample=False)
    width = batch["input_ids"].shape[1]
    for row, answer in zip(mixed, answers, strict=True):
        print(f"  {row}: {tokenizer.decode(answer[width:], skip_special_tokens=True).strip()!r}")

    # Every route is scored on both tasks: nothing is loaded, merged or copied in between.
    def losses(choice: str | dict[str, float] | None) -> dict[str, float]:
        with bank.route(choice):
            return {task: _loss(base, tokenizer, task, rows) for task in STEPS}

    table = {"base": losses(None), "places": losses("places"), "sql": losses("sql")}
    weights = [point / (points - 1) for point in range(points)]
    between = {w: losses({"sql": w, "places": 1 - w}) for w in weights}
    mixed_names = {f"{w:.1f} sql + {1 - w:.1f} places": between[w] for w in weights}
    for name, row in (table | mixed_names).items():
        told = ", ".join(f"{task} {loss:.2f}" for task, loss in row.items())
        print(f"loss with {name}: {told}")
    return _draw(out / "many_adapters.png", table, between)


def _loss(base, tokenizer, task: str, rows: int) -> float:
    data = lk.DataConfig(validation=f"builtin:{task}:test", validation_rows=rows)
    return lk.evaluate(model=base, tokenizer=tokenizer, data=data, metrics=["loss"])["loss"]


def _draw(
    picture: Path, table: dict[str, dict[str, float]], between: dict[float, dict[str, float]]
) -> Path:
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    matrix, mixing = figure.subplots(1, 2)
    values = [[row[task] for task in STEPS] for row in table.values()]
    matrix.imshow(values, cmap="YlGnBu_r", aspect="auto")
    for y, row in enumerate(values):
        for x, loss in enumerate(row):
            light = {"color": "white"} if loss < max(map(max, values)) / 2 else {}
            matrix.text(x, y, f"{loss:.2f}", ha="center", va="center", **light)
    matrix.set_xticks(range(len(STEPS)), [f"rows of {task}" for task in STEPS])
    matrix.set_yticks(range(len(table)), list(table))
    matrix.set_title("Loss (nats per token) of each adapter on each task")
    for task in STEPS:
        mixing.plot(list(between), [loss[task] for loss in between.values()], "o-", label=task)
    mixing.set(title="A weighted sum of both", xlabel="weight of sql (places: the rest)")
    mixing.set(ylabel="loss (nats per token)", yscale="log")
    mixing.yaxis.set_major_formatter("{x:g}")
    mixing.legend(frameon=False, title="rows of")
    mixing.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)
    return picture


if __name__ == "__main__":
    print(story(Path("out/many_adapters")))
