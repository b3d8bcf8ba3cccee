"""The page of what of the paper holds: how evidence counts, and that the page is made again."""

from pathlib import Path

import pytest
import torch

import lorakit as lk
from lorakit.paper.cell import cells
from lorakit.paper.evidence import Found, Measured, Peak, ShownByTest, Sources, Versus
from lorakit.paper.reproduction import claims, readme_table, reproduction_page, verdict

ROOT = Path(__file__).parents[2]
HERE = Sources(ROOT / "paper" / "results", ROOT / "benchmarks" / "results")


def test_the_page_is_that_of_the_results(tmp_path):
    page = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    made = tmp_path / "reproduction.md"
    made.write_text(reproduction_page(HERE), encoding="utf-8")
    assert page == made.read_text("utf-8"), f"run `lorakit paper claims --out docs`: {made}"


def test_every_claim_s_evidence_exists():
    for claim in claims().claims:
        for piece in claim.evidence:
            if isinstance(piece, ShownByTest):
                file, _, name = piece.test.partition("::")
                assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")
            if isinstance(piece, Measured):
                assert next(iter(piece.found(HERE))).holds is not None, piece.what
            named = {Versus: ("cell", "than"), Peak: ()}.get(type(piece), ())
            assert all(getattr(piece, each) in cells() for each in named)
            assert not isinstance(piece, Peak) or set(piece.cells) <= set(cells())
    assert readme_table(HERE).startswith("|  | paper | ours (small) | why different |")


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
