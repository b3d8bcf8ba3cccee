"""An environment for each tool that others wrote: `python tests/tools/make.py [NAME …]`.

Each lies over the environment that makes it, whose packages it sees where it has none of its own,
and is made under build/tools, or where LORAKIT_TOOLS says. `make test-all` makes all of build/tools
first; without it the tests of those that are not there are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "trl": ("trl",),
    "lightning": ("lightning",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "ray": ("ray[serve]",),
    # What it needs beside its files is fairseq, which nothing here runs.
    "detransliterator": ("--no-deps", "detransliterator"),
}
"""What is installed for each tool."""
ON_THEIR_OWN = ("mlflow", "trackio")
"""Tools that do not resolve beside the versions of constraints.txt."""


def environment_of(name: str) -> Path:
    """Where the environment of a tool is, or would be."""
    return Path(os.environ.get("LORAKIT_TOOLS", ROOT / "build" / "tools")) / name


def make(name: str) -> None:
    """Make the environment of a tool, with the newest version of it."""
    folder = environment_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    below = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (Path(own) / "below.pth").write_text(below)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    how = ["--quiet", "--no-compile", "--disable-pip-version-check"]
    if name not in ON_THEIR_OWN:
        how += ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *how, *PACKAGES[name]], check=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or PACKAGES:
        print(f"making {each}")
        make(each)
