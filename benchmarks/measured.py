"""What every result file says of where it was measured."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks"


def circumstances() -> dict[str, Any]:
    """Return commit, versions and hardware: to be asked before the work starts."""
    versions = {}
    for name in ("lorakit", "torch", "transformers", "peft", "sacrebleu"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "")
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    special = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    return " ".join([name, *special])


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write a result to docs/benchmarks/NAME.json, and return the file."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    return file
