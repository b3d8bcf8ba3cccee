"""The generated pages say what the code says."""

from pathlib import Path

from lorakit.cli.reference import reference

DOCS = Path(__file__).parents[1] / "docs"


def test_cli_page_is_the_help_of_today():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "docs/cli.md is out of date: run `make docs`"
