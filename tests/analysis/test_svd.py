"""The randomised decomposition of large matrices, against the exact one."""

import pytest
import torch

from analysis.made import orthonormal
from lorakit.analysis import svd
from lorakit.analysis.svd import top_norm, top_svd


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_UP_TO", 8)


def noise(rows, columns):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def falling(rows, columns):
    """A matrix whose singular values fall as 1/√i, about as those of a trained weight."""
    values = torch.arange(1, columns + 1, dtype=torch.float64) ** -0.5
    u, v = orthonormal(rows, columns, seed=0), orthonormal(columns, columns, seed=1)
    return (u * values) @ v.mT


@pytest.mark.parametrize(
    ("matrix", "within"),
    [(noise(400, 300), 0.02), (noise(300, 400), 0.02), (falling(400, 300), 1e-3)],
    ids=["tall noise", "wide noise", "falling"],
)
def test_the_largest_values_are_those_of_the_full_one(all_are_large, matrix, within):
    found, exact = top_svd(matrix, 16)
    true = torch.linalg.svdvals(matrix.double())[:16]
    assert not exact
    assert bool((found.s <= true * (1 + 1e-5)).all())
    assert found.s.norm().item() == pytest.approx(true.norm().item(), rel=within)
    assert top_norm(matrix, 16) == (pytest.approx(found.s.norm().item()), False)
    for vectors in (found.u, found.v):
        torch.testing.assert_close(vectors.mT @ vectors, torch.eye(16).double(), atol=1e-5, rtol=0)
    inside = found.u.mT @ matrix.double() @ found.v
    torch.testing.assert_close(inside, found.s.diag(), atol=1e-4, rtol=0)


def test_a_matrix_of_few_directions_has_no_others(all_are_large):
    few = falling(60, 40)[:, :3] @ noise(3, 50).double()
    true = torch.linalg.svdvals(few)
    found, _ = top_svd(few, 20)
    torch.testing.assert_close(found.s, true[:20], atol=1e-5, rtol=0)
    assert top_svd(torch.zeros(30, 20), 4)[0].s.tolist() == [0.0] * 4


def test_the_norm_alone_is_exact_where_the_matrix_is_small():
    for matrix in (noise(40, 30), noise(30, 40)):
        for rank in (0, 5, 30):
            norm, exact = top_norm(matrix, rank)
            true = torch.linalg.svdvals(matrix.double())[:rank].norm().item()
            assert (norm, exact) == (pytest.approx(true, rel=1e-12), True)
