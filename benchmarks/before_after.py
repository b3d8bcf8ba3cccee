"""Two states of the sources compared: short runs of `bench train` and `bench mixed`, in pairs.

    python benchmarks/before_after.py --before ../old/src [--after src] [--out FILE]

Each measurement is a process of its own with one of the two source folders, before and after
alternating, with the same settings and threads. PEFT and full fine-tuning are left out. A ratio is
the time before over the time after, so more than 1 is a gain. The plain model, measured in the same
processes, is the control: nothing of lorakit is in it, so its ratios show the noise of the machine.
Eight minutes on two idle cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.bench.environment import uncommitted
from lorakit.bench.result import OURS, Findings, Goal
from lorakit.bench.rounds import Seconds
from lorakit.bench.tables import table
from measured import begin, write_result

HERE = Path(__file__).parent
BEFORE, AFTER = "before", OURS
"""The two states; the later one is the one that the ratios of a result favour."""
CONTROL = "plain"
"""The participant of `bench mixed` that has nothing of lorakit."""
NO_LOSS = 0.97
"""The least ratio that counts as no loss; the rest is noise."""
SHORT = {
    "train": ["--no-peer", "--no-full", "--starts", "0", "--repeats", "3", "--held-out", "8"],
    "mixed": [
        *("--no-peer", "--repeats", "3", "--new-tokens", "8"),
        *("--many-rows", "8", "--distinct", "8"),
    ],
}
"""The flags of each benchmark, which both states have."""
TINY = {
    "train": ["--steps", "1", "--batch-size", "1", "--repeats", "1", "--held-out", "1"],
    "mixed": [
        *("--rows", "2", "--adapters", "2", "--prompt-tokens", "2", "--new-tokens", "2"),
        *("--prefill-tokens", "2", "--many-rows", "2", "--many-prefill-tokens", "2"),
        *("--distinct", "2", "--repeats", "1"),
    ],
}
"""Further flags with which the program can be tried in a minute or two."""

Run = dict[str, dict[str, Any]]
"""The result of each benchmark, by name, in one process each."""


def measured(source: Path, flags: Mapping[str, Sequence[str]], settings: Path, threads: int) -> Run:
    """The results of both benchmarks with the sources in a folder."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(source.resolve()),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = {}
    for name, more in flags.items():
        words = ["bench", name, *([str(settings)] if name == "train" else []), *more]
        command = [sys.executable, "-m", "lorakit.cli", *words, "--threads", str(threads), "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout)
        if done.returncode:
            raise SystemExit(f"error: {source}, bench {name}: {found[name]['error']['message']}")
    return found


def medians(run: Run) -> Iterator[tuple[str, float]]:
    """The median of each measurement of ours in a run, and of the control, by name."""
    for name, result in run.items():
        for what, each in result["seconds"].items():
            for who in (OURS, CONTROL):
                if who in each:
                    control = f", {CONTROL} model" if who == CONTROL else ""
                    yield f"{name} {what}{control}".replace("_", " "), each[who]["median"]


def findings(runs: Mapping[str, Sequence[Run]]) -> Findings:
    """The times of both states, their ratios, and whether there is a loss."""
    times = {state: [dict(medians(run)) for run in each] for state, each in runs.items()}
    timings = {
        what: {
            state: Seconds(rounds=tuple(each[what] for each in found))
            for state, found in times.items()
        }
        for what in times[AFTER][0]
    }
    pairs = {
        what: [
            before / after
            for before, after in zip(each[BEFORE].rounds, each[AFTER].rounds, strict=True)
        ]
        for what, each in timings.items()
    }
    peaks = {
        state: [run["train"]["memory_bytes"][OURS] for run in each if run["train"]["memory_bytes"]]
        for state, each in runs.items()
    }
    losses = [each[0]["train"]["curves"][OURS] for each in runs.values()]
    return Findings(
        timings=timings,
        goals=tuple(
            Goal(
                what=f"{what}, speed against before",
                got=statistics.median(pairs[what]),
                limit=NO_LOSS,
                at_least=True,
            )
            for what in ("train step", "mixed decode", "mixed prefill")
        ),
        memory={state: int(statistics.median(each)) for state, each in peaks.items() if each},
        checks={"largest_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True))},
        tables={
            "pairs": [
                {
                    "measured": what,
                    "median ratio of a pair": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
                for what, ratios in pairs.items()
            ]
        },
    )


def main() -> None:
    """Measure in pairs, print the tables, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the source folder before")
    parser.add_argument("--after", type=Path, default=HERE.parent / "src", help="and after")
    parser.add_argument("--settings", type=Path, default=HERE / "train_e2e.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="pairs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--dtype", default="bfloat16", help="of the base; float32 for processors without bfloat16"
    )
    parser.add_argument("--tiny", action="store_true", help="try the program on small sizes")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    given = parser.parse_args()
    start = begin(given.out)
    sources = {BEFORE: given.before, AFTER: given.after}
    if given.out is not None:
        for source in sources.values():
            if changed := uncommitted(source):
                raise SystemExit(f"error: {source} has uncommitted changes: {', '.join(changed)}")
    precision = ["--dtype", given.dtype]
    flags = {
        name: [*more, *precision, *(TINY[name] if given.tiny else [])]
        for name, more in SHORT.items()
    }
    runs: dict[str, list[Run]] = {state: [] for state in sources}
    for number in range(given.rounds):
        for state, source in sources.items():
            runs[state].append(measured(source, flags, given.settings, given.threads))
            print(f"round {number + 1}, {state}: done", file=sys.stderr, flush=True)
    first = {state: each[0]["train"] for state, each in runs.items()}
    result = {
        "bench": "before_after",
        "settings": {**first[AFTER]["settings"], "repeats": given.rounds, "flags": flags},
        "commits": {state: each["commit"] for state, each in first.items()},
        **{key: first[AFTER][key] for key in start},
        **findings(runs).to_json(),
    }
    result["checks"]["commit_before"] = first[BEFORE]["commit"]
    print(table(result))
    write_result(given.out, result)


if __name__ == "__main__":
    main()
