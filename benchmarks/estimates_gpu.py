"""`lorakit estimate` beside the memory that training took on a GPU (train_gpu.py's result).

    python benchmarks/estimates_gpu.py --trained FILE [--out FILE] [--tiny]

The estimate is made of a model's shape alone, so nothing is trained here.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import begin, write_result
from train_gpu import RANK, TINY, WORK, Work


def estimated_bytes(work: Work) -> int:
    """The memory of training on a model of this shape, as the verb says."""
    with tempfile.TemporaryDirectory() as folder:
        work.config.save_pretrained(folder)
        line = [sys.executable, "-m", "lorakit", "estimate", "--json", "--model", folder]
        line += ["--row-tokens", str(work.tokens), "--batch-size", str(work.rows)]
        line += ["--dtype", "bfloat16", "--lora.rank", str(RANK), "--lora.targets", "all-linear"]
        found = subprocess.run(line, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(found.stderr.strip() or found.stdout.strip())
    return int(json.loads(found.stdout)["training_bytes"])


def main() -> None:
    """Compare, print, and write the result, if --out names a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="train_gpu.py's result")
    parser.add_argument("--out", type=Path, help="a file for the JSON")
    parser.add_argument("--tiny", action="store_true", help="the tiny model")
    arguments = parser.parse_args()
    conditions = begin(arguments.out)
    trained = json.loads(arguments.trained.read_text(encoding="utf-8"))["rows"]
    took = {row["model"]: row["memory GB"] for row in trained if row["who"] == "ours"}
    rows: list[dict[str, Any]] = []
    for name, work in (TINY if arguments.tiny else WORK).items():
        if name in took and not work.in_4_bits:
            estimate = estimated_bytes(work) / 1e9
            error = round(100 * (estimate / took[name] - 1), 1)
            rows.append({"model": name, "GB": estimate, "measured GB": took[name], "%": error})
            print(rows[-1])
    told = [f"{row['model']} {row['GB']:.2f} GB, {row['%']:+} %" for row in rows]
    write_result(arguments.out, {**conditions, "rows": rows, "told": told})


if __name__ == "__main__":
    main()
