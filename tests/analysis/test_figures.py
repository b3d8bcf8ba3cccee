"""Figures: their numbers as tables, their pictures as SVG and PNG."""

import re
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from lorakit.analysis.figures import HeatMap, Lines, check_plots, drawn, write_figures
from lorakit.errors import MissingExtraError

HEAT = HeatMap(
    name="norm",
    title="Size",
    note="‖ΔW‖ of each update.",
    row_axis="layer",
    column_axis="module",
    rows=["0", "1"],
    columns=["q", "v"],
    values=[[1.0, 2.5], [None, 0.125]],
    unit="‖ΔW‖",
)
LINES = Lines(
    name="spectrum",
    title="Spectrum",
    note="Singular values.",
    x_axis="number",
    y_axis="σ",
    x=[1, 2, 3],
    lines={"0": [1.0, 0.1, 0.01], "1": [2.0, None, None]},
    logarithmic=True,
    ordered="layer",
)


def test_the_table_of_a_figure_has_its_numbers():
    assert list(HEAT.table) == [
        ["layer \\ module", "q", "v"],
        ["0", "1", "2.5"],
        ["1", "–", "0.125"],
    ]
    head, _, second, _ = LINES.table
    assert head == ["number", "0", "1"]
    assert second == ["2", "0.1", "–"]


@pytest.mark.parametrize("figure", [HEAT, LINES], ids=lambda figure: figure.name)
def test_a_picture_in_a_page_takes_its_colours_and_has_ids_of_its_own(figure):
    found = drawn(figure)
    tree = ElementTree.fromstring(f"<svg{found.svg}")
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert f"{figure.name}-plot" in ids
    assert all(name.startswith(f"{figure.name}-") for name in ids)
    used = re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", found.svg)
    assert set(used) <= set(ids)
    texts = {
        "".join(each.itertext()).strip() for each in tree.iter("{http://www.w3.org/2000/svg}text")
    }
    assert {"layer", "module", "‖ΔW‖"} <= texts or {"number", "σ", "layer"} <= texts
    if isinstance(figure, Lines):
        assert {"10⁻²", "10⁻¹", "10⁰"} <= texts
    assert not [text for text in texts if "$" in text]
    assert "currentColor" in found.svg
    assert "width" not in tree.attrib
    assert drawn(figure) == found


def test_ticks_between_powers_of_ten_are_written_as_these_are():
    values = [0.18, 0.09, 0.03]
    svg = drawn(replace(LINES, x=[1, 2, 3], lines={"0": values, "1": values[::-1]})).svg
    texts = [each.text or "" for each in ElementTree.fromstring(f"<svg{svg}").iter()]
    assert any(re.search("[2-9]·10⁻[¹²]", text) for text in texts), texts
    assert not any(re.fullmatch(r"\s*\de-0\d\s*", text) for text in texts)


@pytest.mark.thorough
def test_every_figure_is_written_as_png_and_svg(tmp_path):
    files = write_figures([HEAT, LINES], tmp_path / "figures")
    assert [file.name for file in files] == [
        *("norm.png", "norm.svg", "spectrum.png", "spectrum.svg"),
    ]
    assert files[0].read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(files[1])
    before = files[3].read_bytes()
    write_figures([LINES], tmp_path / "figures")
    assert files[3].read_bytes() == before


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorakit\[plots\]'"):
        check_plots()
