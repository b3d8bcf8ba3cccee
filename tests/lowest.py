"""The lowest versions that pyproject.toml allows, as constraints for pip: `make test-lowest`."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN_BUILD = {"torch", "triton"}
"""Installed before the others, as the build for this machine; it says which Triton it needs."""
TOOLS = "dev"
"""The extra of what tests lorakit, which is pinned as for all tests."""


def constraints() -> Iterator[str]:
    """A line for each package that lorakit or one of its extras names, with its lower bound.

    What these need in turn is whatever pip finds to fit them.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    used = [*project["dependencies"], *(each for name in extras for each in extras[name])]
    tools = {name_of(each) for each in extras[TOOLS]}
    for bound in used:
        name = name_of(bound)
        if ">=" in bound and name not in tools and name not in OWN_BUILD:
            # A constraint names a package alone, without extras.
            yield re.sub(r"\[.*?\]", "", bound).replace(">=", "==")
    for pin in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if name_of(pin) in tools - OWN_BUILD:
            yield pin


def name_of(requirement: str) -> str:
    """A package's name as it is compared: PyPI's pre-commit is pip's pre_commit."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("_", "-").lower()


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints())
