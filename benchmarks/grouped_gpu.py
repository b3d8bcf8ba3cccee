"""Mixed batches on a GPU: plain torch against the Triton kernels, for one layer.

    python benchmarks/grouped_gpu.py [--out FILE]

Times the down-projection and the up-projection onto an output, forward and with the backward, for
decoding (64 rows of one token) and for a prefill (16 rows of 512 tokens), d 4096, rank 16, a
bfloat16 base, float32 weights. Gathering is left out of the forward, as it happens once per route,
but not of the backward, which is training. Prints a table and JSON; medians, alternating paths.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from lorakit.kernels.grouped import down_project, gather, up_project_onto
from lorakit.kernels.grouping import Grouping, Kernels, group_rows
from measured import begin, write_result

D, RANK = 4096, 16
WORK = {"decode": (64, 1), "prefill": (16, 512)}
ADAPTERS = (1, 4, 16, 64)
PATHS = ("plain", "triton")
WARM_UPS, REPEATS, CALLS = 3, 20, 10


class Layer:
    """Inputs, output and weights of one layer, whose rows use so many adapters in rotation."""

    def __init__(self, rows: int, tokens: int, adapters: int) -> None:
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*size: int, dtype: torch.dtype) -> torch.Tensor:
            made = torch.randn(size, generator=generator, device="cuda") / 64
            return made.to(dtype).requires_grad_()

        self.index_of_row = [row % adapters for row in range(rows)]
        self.x = random(rows, tokens, D, dtype=torch.bfloat16)
        self.output = random(rows, tokens, D, dtype=torch.bfloat16)
        self.a = random(adapters, RANK, D, dtype=torch.float32)
        self.b = random(adapters, RANK, D, dtype=torch.float32)

    def forward(self, kernels: Kernels) -> Callable[[], None]:
        """A forward without gradients, of gathered weights."""
        grouping = self._grouping(kernels)
        a, b = (gather(stack.detach(), grouping) for stack in (self.a, self.b))
        output = self.output.detach().clone()

        @torch.inference_mode()
        def run() -> None:
            up_project_onto(output, down_project(self.x, a, grouping), b, grouping)

        return run

    def backward(self, kernels: Kernels) -> Callable[[], None]:
        """A forward and its backward, from the stacks of weights."""
        grouping = self._grouping(kernels)
        grad = torch.ones_like(self.output)

        def run() -> None:
            h = down_project(self.x, gather(self.a, grouping), grouping)
            found = up_project_onto(self.output.clone(), h, gather(self.b, grouping), grouping)
            torch.autograd.grad(found, (self.x, self.a, self.b), grad)

        return run

    def _grouping(self, kernels: Kernels) -> Grouping:
        return group_rows(self.index_of_row, device="cuda", dtype=self.a.dtype, kernels=kernels)


def microseconds(call: Callable[[], None]) -> float:
    """The time of one call, from some calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / CALLS


def medians(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The median time of each call, measured alternately."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(WARM_UPS + REPEATS):
        for name, call in calls.items():
            time_us = microseconds(call)
            if repeat >= WARM_UPS:
                times[name].append(time_us)
    return {f"{name}_us": round(statistics.median(found), 1) for name, found in times.items()}


def measure() -> list[dict[str, object]]:
    """One row of figures per kind of work, number of adapters and direction."""
    rows = []
    for work, (batch, tokens) in WORK.items():
        for adapters in (count for count in ADAPTERS if count <= batch):
            layer = Layer(batch, tokens, adapters)
            for direction in ("forward", "backward"):
                calls = {path: getattr(layer, direction)(path) for path in PATHS}
                facts = {"work": work, "adapters": adapters, "direction": direction}
                rows.append({**facts, **medians(calls)})
    return rows


def table(rows: list[dict[str, object]]) -> str:
    """The figures as a Markdown table."""
    heads = list(rows[0])
    lines = [heads, ["---"] * len(heads), *([str(row[head]) for head in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def told(rows: list[dict[str, object]]) -> list[str]:
    """For each kind of work with the most adapters, how much faster Triton is."""
    last = {f"{row['work']} {row['direction']}": row for row in rows}
    return [
        f"{work}, {row['adapters']} adapters: plain torch takes "
        f"{float(str(row['plain_us'])) / float(str(row['triton_us'])):.2f} times Triton's time"
        for work, row in last.items()
    ]


def main() -> None:
    """Measure, print, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("No CUDA device was found, so there is nothing to measure.")
        return
    conditions = begin(out)
    settings = {"d": D, "rank": RANK, "work": WORK, "base": "bfloat16", "weights": "float32"}
    rows = measure()
    result = {**conditions, "settings": settings, "rows": rows, "told": told(rows)}
    print(table(rows), json.dumps(result, indent=2), sep="\n\n")
    write_result(out, result)


if __name__ == "__main__":
    main()
