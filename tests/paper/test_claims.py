"""The page of what of the paper holds: how evidence counts, and that the page is made again."""

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.data.metrics.score import score_names, scorer
from lorakit.errors import OutputError
from lorakit.paper.cell import cells
from lorakit.paper.evidence import BenchFigure, Found, Peak, ShownByTest, Sources, Versus
from lorakit.paper.figure import draw, points
from lorakit.paper.job import jobs_of
from lorakit.paper.pages import remake, small_pages, with_table
from lorakit.paper.reproduction import claims, verdict
from lorakit.paper.results import file_of, write_result
from lorakit.paper.section7 import found_of
from lorakit.paper.section7_pages import draw_similarity
from lorakit.paper.settings import CellChoice

ROOT = Path(__file__).parents[2]
HERE = Sources(ROOT / "paper" / "results", ROOT / "benchmarks" / "results")


def test_all_pages_are_those_of_the_results():
    made = {**small_pages(HERE), Path("README.md"): with_table(ROOT, HERE)}
    old = [str(place) for place, text in made.items() if (ROOT / place).read_text("utf-8") != text]
    assert old == [], "run `lorakit paper pages`"


@pytest.fixture
def put(tmp_path):
    """A function that writes results of a cell's small runs of seed 0, as if they had been run."""

    def write(cell, score, **changes):
        for job in jobs_of(CellChoice(cells=(cell,), seeds=(0,))):
            scores = dict.fromkeys(score_names(job.task), score)
            known = {
                "status": "done",
                "hash": job.hash,
                "given": job.given,
                "scorer": scorer(job.task, job.scoring.variant),
                "scores": {"best": scores, "last": scores},
                "parameters": {"trained": 9, "without_head": 8},
                "model": job.model,
                "seed": 0,
                "commit": "abc",
                "hardware": {"gpu": None, "processor": "a processor", "threads": 1},
            }
            write_result(file_of(job, tmp_path / "results"), {**known, **changes}, {})

    return write


@pytest.mark.thorough
def test_the_pages_follow_the_results(put, tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- paper -->\nold\n<!-- end of paper -->\nb\n")
    sources = Sources(tmp_path / "results", tmp_path)
    put("table2.lora", 0.8)
    put("table2.ft", 0.7, hash="of other settings")
    files = [str(file.relative_to(tmp_path)) for file in remake(tmp_path, sources)]
    assert {"docs/reproduction.md", "README.md", "paper/figures/figure2.small.svg"} < set(files)
    readme = (tmp_path / "README.md").read_text("utf-8")
    # Of the paper's eight columns the six that ours has.
    paper = (63.4 + 89.7 + 86.6 + 91.5 + 95.1 + 93.3) / 6
    assert f"| Table 2, LoRA, mean of 6 tasks | {paper:.1f} | 80.0 (2 not run) |" in readme
    assert "| Table 2, FT, mean of 6 tasks | 85.2 | 70.0 (1 stale, 2 not run) |" in readme
    assert readme.startswith("a\n<!-- paper -->\n| ")
    assert readme.endswith("|\n<!-- end of paper -->\nb\n")
    page = (tmp_path / "docs" / "reproduction.md").read_text("utf-8")
    assert "| LoRA is level with full fine-tuning, or better. |" in page
    assert "- yes: table2.lora beside table2.ft, CoLA: 80.0 and 70.0, with 1 of leave" in page
    table = (tmp_path / "paper" / "tables" / "table2.small.md").read_text("utf-8")
    assert "| FT | 0.000M | 70.0 (1 stale, 2 not run) |" in table
    with pytest.raises(OutputError, match="has no table of the paper"):
        with_table(tmp_path / "docs", sources)


@pytest.mark.thorough
def test_no_page_is_of_a_table_that_is_gone():
    places = {ROOT / place for place in small_pages(HERE)}
    assert set((ROOT / "paper" / "tables").iterdir()) <= places


@pytest.mark.thorough
def test_the_figures_are_those_of_the_results(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    drawn = ROOT / "paper" / "figures" / "figure2.small.svg"
    if f"Matplotlib v{matplotlib.__version__}" not in drawn.read_text("utf-8"):
        pytest.skip("another matplotlib draws other lines")
    draw(points("figure2", HERE.results), "figure2", tmp_path)
    for name in ("figure3", "figure4"):
        if found := found_of(name, HERE.results):
            draw_similarity(name, found, tmp_path)
    for made in tmp_path.glob("*.svg"):
        assert made.read_text("utf-8") == (drawn.parent / made.name).read_text("utf-8"), made.name
        assert (drawn.parent / made.name).with_suffix(".png").is_file()


def test_every_claim_s_evidence_exists():
    for claim in claims().claims:
        for piece in claim.evidence:
            if isinstance(piece, ShownByTest):
                file, _, name = piece.test.partition("::")
                assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
            if isinstance(piece, BenchFigure):
                assert next(iter(piece.found(HERE))).holds is not None, piece.what
            named = {Versus: ("cell", "than"), Peak: ()}.get(type(piece), ())
            assert all(getattr(piece, each) in cells() for each in named)
            assert not isinstance(piece, Peak) or set(piece.cells) <= set(cells())


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        ([True, True], "holds"),
        ([True, None], "holds"),
        ([True, False], "holds in part"),
        ([False, None], "does not hold here"),
        ([None], "not measured yet"),
    ],
)
def test_a_verdict_is_of_what_was_measured(holds, said):
    assert verdict([Found("", each) for each in holds]) == said


def test_weight_decay_pulls_towards_the_pretrained_weights():
    # Version 1 of the paper: decay of A and B is decay of W towards W0, not towards zero.
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    base = layer[0].weight.detach().clone()
    lk.attach(layer, lk.LoRAConfig(rank=2, targets=("0",)))
    trained = [each for each in layer.parameters() if each.requires_grad]
    for each in trained:
        each.data.normal_()
        each.grad = torch.zeros_like(each)
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    inputs = torch.eye(8)
    distances = []
    for _ in range(200):
        optimizer.step()
        with torch.no_grad():
            distances.append(float((layer(inputs).T - base).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 * distances[0] < float(base.norm())


def test_full_rank_and_biases_reach_any_weights():
    torch.manual_seed(0)
    layer, wanted = (torch.nn.Sequential(torch.nn.Linear(6, 4)).double() for _ in range(2))
    change = (wanted[0].weight - layer[0].weight).detach()
    bias = (wanted[0].bias - layer[0].bias).detach()
    config = lk.LoRAConfig(rank=4, targets=("0",), bias="all", dtype="float32")
    lk.attach(layer, config)
    for name, tensor in layer.named_parameters():
        if not tensor.requires_grad:
            continue
        if "lora_a" in name:
            tensor.data.copy_(change)
        elif "lora_b" in name:
            tensor.data.copy_(torch.eye(4))
        else:
            tensor.data.add_(bias)
    inputs = torch.randn(5, 6).double()
    torch.testing.assert_close(layer(inputs), wanted(inputs), rtol=0, atol=1e-5)
