"""The generated pages say what the code says."""

import re
from pathlib import Path

from lorakit.cli.reference import reference
from lorakit.config.method_defaults import DEFAULTS
from lorakit.config.methods import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_cli_page_is_the_help_of_today():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "docs/cli.md is out of date: run `make docs`"


def test_the_page_of_methods_has_all_with_their_rates():
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([a-z-]+)` \| [^|]+ \| [^|]+ \| ([0-9.e-]+) \|", page, flags=re.MULTILINE
    )
    assert sorted(name for name, _ in rows) == sorted(METHODS)
    assert {name: float(rate) for name, rate in rows} == {
        name: defaults.learning_rate for name, defaults in DEFAULTS.items()
    }


def test_the_files_that_the_architecture_names_exist():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "lorakit"
    named = set(re.findall(r"`([a-z_/]+(?:\.py|/))`", page))
    assert len(named) > 30
    assert [
        name for name in named if not ((source / name).exists() or (ROOT / name).exists())
    ] == []
