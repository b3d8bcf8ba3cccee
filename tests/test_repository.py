"""What the files around the source say agrees with the source."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

import lorakit
import lowest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "lorakit"
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == lorakit.__version__


def test_sizes_that_are_named_are_checked_by_make_test():
    (checked,) = re.findall(r"^SHAPED := (\S+)$", read("Makefile"), re.MULTILINE)
    named = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^from jaxtyping import", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert len(named) > 20
    packages = tuple(checked.split(","))
    assert [
        name for name in named if not f"{name}.".startswith(tuple(f"{p}." for p in packages))
    ] == []


def test_pinned_versions_are_at_least_the_lowest():
    pins = {}
    for line in read("constraints.txt").splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pins[lowest.name_of(name)] = Version(version)
    bounds = dict(line.partition(";")[0].split("==") for line in lowest.constraints())
    assert {"transformers", "numpy", "peft", "pytest"} <= bounds.keys()
    assert "torch" not in bounds, "torch comes first, as the build for the machine"
    assert not [name for name in bounds if lowest.name_of(name) not in pins], "not pinned"
    assert not [name for name, low in bounds.items() if pins[lowest.name_of(name)] < Version(low)]


def test_torch_is_the_same_version_in_all_files_that_install_it():
    pinned = re.findall(r"^torch==(.+)$", read("constraints.txt"), flags=re.MULTILINE)
    bound = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    lowest_torch = next(each for each in bound if each.startswith("torch>=")).partition(">=")[2]
    files = ("Makefile", ".github/workflows/checks.yml", "Dockerfile", "Dockerfile.cuda")
    named = re.findall(r"torch==([\d.]+)", "".join(map(read, files)))
    assert set(named) == {*pinned, f"{lowest_torch}.0"}


def test_commits_are_checked_by_the_tools_of_make_check():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks}
    assert tools == set(re.findall(r"\$\(BIN\)/(ruff|mypy)", read("Makefile")))


def test_no_page_has_two_sides_of_a_merge():
    # Source with such lines does not compile.
    pages = {*PAGES, *ROOT.glob("*.md"), *ROOT.glob("paper/**/*.md")}
    marks = re.compile("^(<{7}|>{7}) ", flags=re.MULTILINE)
    assert [page for page in pages if marks.search(page.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_glossary_has_each_term_once_in_order_and_names_rooms_that_there_are():
    table = read("CONTRIBUTING.md").partition("| term | meaning | room |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]
    terms = [term.lower() for term, _, _ in rows]
    assert len(rows) > 50
    assert terms == sorted(set(terms))
    rooms = {room for *_, cell in rows for room in cell.split(", ")}
    assert not {
        room for room in rooms if not (PACKAGE / room).exists() and not (ROOT / room).exists()
    }
