"""The docs site: it builds without a warning, and shows itself without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit as lk
import pages

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from mkdocs.commands.build import build
from mkdocs.config import load_config
build(load_config(sys.argv[1], docs_dir=sys.argv[2], site_dir=sys.argv[3], strict=True))
"""


def test_the_reference_has_every_public_name_once():
    named = re.findall(r"^::: lorakit\.(\w+)$", pages.reference(), flags=re.MULTILINE)
    assert sorted(named) == sorted(lk.__all__)
    # The page of the errors has all but their base, which is a public name itself.
    assert '::: lorakit.errors\n    options:\n      filters: ["!^_.*$", "!^LorakitError$"]' in (
        pages.reference()
    )


def test_the_site_has_every_page_of_the_docs():
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    written = {str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md")}
    lost = written - set(re.findall(r"docs/[\w/-]+\.md", config))
    assert not lost, "mkdocs.yml lists every page in its nav"


@pytest.mark.thorough
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocstrings")
    pages.gather(tmp_path / "pages")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, ROOT / "mkdocs.yml", tmp_path / "pages", site],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = (site / "docs" / "reference.html").read_text(encoding="utf-8")
    assert all(f'id="lorakit.{name}"' in text for name in lk.__all__)
    assert len(re.findall(r'class="doc doc-heading"[^§]{0,300}?LorakitError</span>', text)) == 1
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*", page.read_text(encoding="utf-8"))
        assert not [each for each in loaded if "//" in each and "canonical" not in each], page
