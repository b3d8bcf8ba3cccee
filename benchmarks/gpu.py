"""All that lorakit has on a GPU, tested and measured within eight minutes: `make gpu`.

    python benchmarks/gpu.py [--out FOLDER] [--tiny]

Nothing is set up: it is for a machine that has torch with CUDA, Triton, PEFT, pytest, hypothesis
and what lorakit itself needs, of which what is missing is named first; what needs bitsandbytes or
liger-kernel is left out without them, and the table says so.
Each part is a program of its own with a limit of time; one that fails or is cut is a line in the
table, which is printed last, and the others go on. --tiny checks the programs on a CPU.
"""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
BUDGET_S = 460
"""Of all parts; the table is printed before eight minutes have passed."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A program that tests or measures."""

    name: str
    limit_s: float
    words: tuple[str, ...]
    """What Python is told."""
    result: Path | None = None
    """The JSON that it writes, whose `told` goes into the table; None: its last line does."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part."""

    name: str
    state: str
    seconds: float
    told: str


def missing() -> list[str]:
    """What lorakit, its peer and the tests need and this Python lacks, as pip is told it."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], "peft", "pytest", "hypothesis"]
    return [each for each in needed if not _is_installed(re.split(r"[^\w-]", each)[0])]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def gpu_tests() -> list[str]:
    """The files with tests that need a GPU; to import the others may take more than there is."""
    files = sorted(TESTS.glob("**/test_*.py"))
    return [str(file) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def parts(folder: Path, *, tiny: bool) -> list[Part]:
    """All parts, in the order of their weight."""
    more = ("--tiny",) if tiny else ()

    def program(name: str, file: str, limit_s: float, *words: str) -> Part:
        out = folder / f"{Path(file).stem}.json"
        words = (str(HERE / file), "--out", str(out), *words)
        return Part(name=name, limit_s=limit_s, words=words, result=out)

    # Warnings are of the versions that are there, which may be others than those of the project.
    pytest = ("-m", "pytest", "-o", "addopts=", "--import-mode=importlib", "-q", "-W", "default")
    trained = str(folder / "train_gpu.json")
    return [
        Part(name="tests", limit_s=100, words=(*pytest, "-m", "gpu", *gpu_tests())),
        program("training beside PEFT, 4-bit", "train_gpu.py", 200, *more),
        program("estimates beside peaks", "estimates_gpu.py", 40, "--trained", trained, *more),
        program("loss, norms, serving", "steps_gpu.py", 70, *more),
        program("mixed batches, segments", "grouped_gpu.py", 50),
    ]


def outcome(part: Part, left_s: float) -> Outcome:
    """Run a part, for as long as it may."""
    if left_s < 1:
        return Outcome(name=part.name, state="left out", seconds=0, told="no time was left")
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *part.words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=min(part.limit_s, left_s))
        state = "done" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        state = "cut"
    print(f"== {part.name}\n{said}", flush=True)
    seconds = time.perf_counter() - begun
    return Outcome(name=part.name, state=state, seconds=seconds, told=_told(part, said))


def _told(part: Part, said: str) -> str:
    """What the table says of a part: the words of its result, or its last line."""
    if part.result is not None and part.result.exists():
        return "; ".join(json.loads(part.result.read_text(encoding="utf-8"))["told"])
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")


def table(outcomes: Sequence[Outcome]) -> str:
    """The parts, as lines."""
    width = max(len(each.name) for each in outcomes)
    return "\n".join(
        f"{each.name:{width}}  {each.state:12}  {each.seconds:5.0f} s  {each.told}"
        for each in outcomes
    )


def main() -> None:
    """Run all parts, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the results")
    parser.add_argument("--tiny", action="store_true", help="tiny models, also without a GPU")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        print("No CUDA device was found, so there is nothing to measure.")
        return
    needed = missing()
    if needed:
        told = " ".join(f"'{each}'" for each in needed)
        raise SystemExit(f"error: this Python lacks {told}: python -m pip install {told}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: --tiny"
    until = time.perf_counter() + BUDGET_S
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcomes = [
            outcome(part, until - time.perf_counter())
            for part in parts(folder, tiny=arguments.tiny)
        ]
    print(f"== {device}", table(outcomes), sep="\n")
    raise SystemExit(any(each.state.startswith("failed") for each in outcomes))


if __name__ == "__main__":
    main()
