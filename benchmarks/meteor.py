"""METEOR of the E2E test set: how long ours takes, in a process that has not read its tables yet.

    python benchmarks/meteor.py --data FOLDER [--out benchmarks/results/meteor.json]

FOLDER has the test.jsonl of E2E. The first reference of each row is taken as the output, and is
scored against the others. The first run on a machine makes the cached tables, which takes longer.
"""

import argparse
import time
from pathlib import Path

from lorakit.config.train import DataConfig
from lorakit.data.metrics.meteor.score import meteor
from lorakit.data.metrics.meteor.tables import tables
from lorakit.data.metrics.ptb import coco_tokens
from lorakit.data.row_types import references_of
from lorakit.data.rows import read_rows
from measured import begin, write_result


def main() -> None:
    """Measure once, print, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    arguments = parser.parse_args()
    where = begin(arguments.out)
    rows = read_rows(f"task:e2e:test@{arguments.data}", DataConfig(), split="test").rows
    texts = [references_of(row) for row in rows]
    outputs = _cut([known[0] for known in texts])
    references = [_cut(known[1:] or known) for known in texts]
    begun = time.perf_counter()
    tables().paraphrases(["restaurant"])
    read = time.perf_counter() - begun
    begun, cpu_begun = time.perf_counter(), time.process_time()
    score, _ = meteor(outputs, references)
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu_begun
    count = sum(map(len, references))
    print(f"METEOR of {len(outputs):,} outputs with {count:,} references: {score:.4f}")
    print(f"tables read in {read:.1f} s, scored in {seconds:.1f} s, {cpu_seconds:.1f} s of CPU")
    figures = {
        "outputs": len(outputs),
        "references": count,
        "meteor": score,
        "seconds_for_tables": read,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    result = {"benchmark": "meteor", "command": "python benchmarks/meteor.py --data FOLDER"}
    write_result(arguments.out, {**result, **figures, "environment": where})


def _cut(texts: list[str] | tuple[str, ...]) -> list[str]:
    return [" ".join(tokens) for tokens in coco_tokens(texts)]


if __name__ == "__main__":
    main()
