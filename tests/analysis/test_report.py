"""The report: what is on its page, and how a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import lorakit as lk
from lorakit.analysis.checks import left_out
from lorakit.analysis.report import AdapterFindings, adapter_page, log_of
from lorakit.analysis.report_of_two import comparison_page
from lorakit.cli.main import main
from tiny_models import build

VOID = {"meta", "link", "br", "hr", "img", "input"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Nesting(HTMLParser):
    """Checks that what is opened is closed, and gathers texts and ids."""

    def __init__(self, page):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str | None] = []
        self.texts: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def trained(seed, rank=4, **settings):
    """An adapter of a tiny Llama, with B drawn at random as if it had trained."""
    model = build("llama")
    lk.attach(model, lk.LoRAConfig(rank=rank, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return lk.extract(model)


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder, with the log of a run."""
    trained(0).save(tmp_path / "first")
    entries = [{"step": step, "loss": 2.0 / step} for step in range(1, 6)]
    entries += [{"step": 5, "eval_loss": 0.5}, {"step": 2, "eval_loss": 1.5}]
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    (tmp_path / "first" / "log.jsonl").write_text(lines)
    return tmp_path / "first"


def looked_into(folder, model=None):
    """The page of an adapter's folder."""
    adapter = lk.Adapter.load(folder)
    found = AdapterFindings(
        spectra=lk.analysis.spectrum(adapter, model=model),
        amplified={} if model is None else lk.analysis.amplification(adapter, model),
        log=log_of(folder),
    )
    return adapter_page(adapter, found, name="first")


def test_a_report_is_one_file_that_needs_nothing_else(folder):
    text = looked_into(folder, build("llama")).html()
    found = Nesting(text)
    assert len(found.ids) == len(set(found.ids))
    urls = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert all("www.w3.org" in url for url in urls)
    assert not re.findall(r"(?:src|@import|<link)", text.replace("data:image/png", ""))
    shown = " ".join(found.texts)
    for told in (
        *("Size of the change", "Size beside the base", "Effective rank", "rank for 90%"),
        *("Amplification factor", "in random ones", "Training curve", "Spectrum of q_proj"),
    ):
        assert told in shown
    spectra = lk.analysis.spectrum(folder)
    norm = spectra["model.layers.1.self_attn.q_proj"].norm
    assert f"<td>{norm:.3g}</td>" in text
    assert {"norm", "effective-rank", "spectrum-q_proj", "training"} <= set(found.ids)


def test_what_an_adapter_has_no_change_of_weights_for_is_said_and_the_rest_shown():
    model = build("llama")
    lk.attach(model, lk.PrefixConfig())
    adapter = lk.extract(model)
    page = adapter_page(adapter, AdapterFindings(notes=left_out(adapter)), name="prefix")
    assert [section.title for section in page.sections] == ["Adapter", "Not shown"]
    assert any("prefix-embedding" in text for text in page.sections[-1].text)


@pytest.mark.thorough
def test_two_adapters_have_maps_of_their_directions_and_of_chance():
    first, second = trained(0), trained(0, rank=2)
    found = lk.analysis.compare(first, second)
    page = comparison_page(first, second, found, names=("one", "other"))
    names = {figure.name: figure for figure in page.figures}
    assert {"shared-a", "shared-b", "phi-a-q_proj-1", "phi-a-q_proj-mean", "cosine"} <= set(names)
    assert (len(names["phi-a-q_proj-1"].rows), len(names["phi-a-q_proj-1"].columns)) == (4, 2)
    phi = lk.analysis.subspace_similarity(first, second)
    expected = phi["model.layers.1.self_attn.q_proj"].tolist()
    assert names["phi-a-q_proj-1"].values == expected
    Nesting(page.html())


def test_an_adapter_beside_itself_agrees():
    adapter = trained(0)
    found = lk.analysis.compare(adapter, adapter)
    page = comparison_page(adapter, adapter, found, names=("one", "same"))
    values = next(figure for figure in page.figures if figure.name == "cosine").values
    assert all(value == pytest.approx(1) for row in values for value in row)


@pytest.mark.thorough
def test_inspect_writes_the_report_and_its_figures(folder, tmp_path, capsys):
    page, figures = tmp_path / "site" / "report.html", tmp_path / "figures"
    words = ["inspect", str(folder), "--html", str(page)]
    assert main([*words, "--figures", str(figures), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert written[0] == str(page)
    names = {file.name for file in figures.iterdir()}
    assert {"norm.png", "norm.svg", "training.png", "spectrum-v_proj.svg"} <= names
    assert len(written) == 1 + len(names)
    before = page.read_bytes()
    assert main(words) == 0
    assert f"written: {page}" in capsys.readouterr().out
    assert page.read_bytes() == before


@pytest.mark.thorough
def test_compare_writes_a_report_of_both(folder, tmp_path, capsys):
    other = trained(1, rank=2).save(tmp_path / "other" / "first")
    page = tmp_path / "both.html"
    assert main(["compare", str(folder), str(other), "--html", str(page)]) == 0
    assert f"written: {page}" in capsys.readouterr().out
    # Two folders of one name are told apart by their paths.
    assert str(other) in page.read_text("utf-8")


MEASURE = """
<!doctype html><title>harness</title><iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inner = document.querySelector("iframe"), page = inner.contentDocument;
  const told = [...page.querySelectorAll("figure[data-kind]")].map(figure => {{
    const box = figure.querySelector("[id*='-plot']").getBoundingClientRect();
    const at = {{clientX: box.x + box.width * .1, clientY: box.y + box.height * .1}};
    const move = new inner.contentWindow.PointerEvent("pointermove", at);
    figure.querySelector("svg").dispatchEvent(move);
    return [figure.id, figure.querySelector("output").textContent];
  }});
  const found = {{wide: page.documentElement.scrollWidth, told: Object.fromEntries(told)}};
  document.title = JSON.stringify(found);
}}
</script>
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.thorough
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_on_a_phone_and_tells_numbers_under_the_pointer(folder, tmp_path, width):
    page = looked_into(folder).html()
    file = tmp_path / "harness.html"
    file.write_text(MEASURE.format(width=width, page=html.escape(page)), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"]
    place = f"--user-data-dir={tmp_path / 'browser'}"
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *words, place, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["wide"] <= width
    spectra = lk.analysis.spectrum(folder)
    q = spectra["model.layers.0.self_attn.q_proj"]
    assert found["told"]["norm"] == f"layer 0, module q_proj: ‖ΔW‖ {q.norm:.3g}"
    assert found["told"]["training"].startswith("step 1, training: 2")
    assert found["told"]["spectrum-q_proj"].startswith("number of the singular value 1, ")
