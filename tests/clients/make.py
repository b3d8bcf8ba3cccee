"""An environment for each client of the server: `python tests/clients/make.py [NAME …]`.

Each is made under build/clients, or where LORAKIT_CLIENTS says; `make test-all` skips those that
are not there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PACKAGES = {
    "openai": ("openai",),
    "litellm": ("litellm",),
    "langchain": ("langchain", "langchain-openai"),
    "llama_index": ("llama-index-llms-openai-like",),
    "pydantic_ai": ("pydantic-ai-slim[openai]",),
    "instructor": ("instructor",),
    "inspect_ai": ("inspect-ai", "openai"),
    "lm_eval": ("lm-eval[api]",),
    "locust": ("locust",),
    "schemathesis": ("schemathesis",),
}
"""What is installed for each client written in Python; each has a session of its name."""
NPM = "npm"
"""The environment of OpenAI's client for Node."""


def place() -> Path:
    """Where the environments are."""
    return Path(os.environ.get("LORAKIT_CLIENTS", ROOT / "build" / "clients"))


def make(name: str) -> None:
    """Make the environment of a client, with the newest version of it."""
    folder = place() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if name == NPM:
        folder.mkdir()
        words = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai"]
        subprocess.run([*words, "--prefix", str(folder)], check=True)
        return
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    how = ["--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*pip, *how, *PACKAGES[name]], check=True)


if __name__ == "__main__":
    for each in sys.argv[1:] or [*PACKAGES, NPM]:
        print(f"making {each}")
        make(each)
