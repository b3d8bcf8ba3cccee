"""φ and principal angles of directions whose overlap is known."""

import math

import pytest
import torch

import lorakit as lk
from analysis.made import adapter_of, orthonormal, planted, random
from lorakit.analysis import principal_angles, random_control, subspace_similarity
from lorakit.errors import AnalysisError
from references import attach_random
from tiny_models import build

ANGLES = [0.0, 1e-7, 0.3, math.pi / 2]


def turned(side):
    """Two adapters whose directions, the i-th of each, are at the angles of `ANGLES`."""
    basis = orthonormal(40, 8, seed=0)
    angles = torch.tensor(ANGLES, dtype=torch.float64)
    first, second = basis[:, :4], basis[:, :4] * angles.cos() + basis[:, 4:] * angles.sin()
    sizes, mixed = (
        torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64),
        orthonormal(4, 4, seed=1),
    )
    other = random(30, 4, seed=2)
    made = []
    for columns in (first, second):
        tall = (columns * sizes) @ mixed.T  # its left singular vectors are the columns
        made.append((tall.T, other) if side == "a" else (other.T, tall))
    return [adapter_of({"x": factors}, alpha=3.0) for factors in made]


@pytest.mark.parametrize("side", ["a", "b"])
def test_similarity_of_a_chosen_overlap(side):
    phi = subspace_similarity(*turned(side), side=side)["x"]
    cosines = [math.cos(angle) ** 2 for angle in ANGLES]
    for i in range(1, 5):
        for j in range(1, 5):
            wanted = sum(cosines[: min(i, j)]) / min(i, j)
            assert phi[i - 1, j - 1].item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("side", ["a", "b"])
def test_principal_angles_are_the_chosen_ones(side):
    found = principal_angles(*turned(side), side=side)["x"]
    # The cosine of 1e-7 is 1 in float64.
    assert found.tolist() == pytest.approx(ANGLES, abs=1e-12)


def test_other_ranks_have_a_row_and_a_column_for_each_direction():
    one, other = random(3, 50, seed=0), random(7, 50, seed=1)
    pair = [adapter_of({"x": (a, random(9, len(a), seed=2))}) for a in (one, other)]
    phi = subspace_similarity(*pair)["x"]
    v, w = (torch.linalg.svd(a, full_matrices=False).Vh.T for a in (one, other))
    assert phi.shape == (3, 7)
    for i, j in ((1, 1), (2, 5), (3, 7), (3, 1)):
        wanted = (v[:, :i].T @ w[:, :j]).norm() ** 2 / min(i, j)
        assert phi[i - 1, j - 1].item() == pytest.approx(wanted.item(), abs=1e-10)
    assert torch.allclose(subspace_similarity(*reversed(pair))["x"], phi.T)


def test_an_untrained_b_has_no_directions():
    a = random(3, 10, seed=0)
    pair = [adapter_of({"x": (a, b)}) for b in (torch.zeros(6, 3).double(), random(6, 3, seed=1))]
    assert subspace_similarity(*pair, side="b")["x"].shape == (0, 3)
    assert principal_angles(*pair, side="b")["x"].shape == (0,)
    assert subspace_similarity(*pair)["x"][-1, -1].item() == pytest.approx(1)


def test_the_random_control_is_what_chance_gives():
    phi = random_control((8, 4000), (64, 4000), seed=3)
    assert phi.shape == (8, 64)
    # The expected overlap of a direction with j random ones of 4,000 is j/4000.
    assert phi[-1, -1].item() == pytest.approx(64 / 4000, rel=0.3)
    assert torch.equal(phi, random_control((8, 4000), (64, 4000), seed=3))
    assert not torch.equal(phi, random_control((8, 4000), (64, 4000), seed=4))


def test_adapters_without_anything_in_common_are_refused():
    one = adapter_of({"x": planted(4, 5, [1.0], seed=0), "y": planted(4, 5, [1.0], seed=0)})
    with pytest.raises(AnalysisError, match="the first has x and 1 more, the second z"):
        subspace_similarity(one, adapter_of({"z": planted(4, 5, [1.0], seed=0)}))
    with pytest.raises(AnalysisError, match="x  4×5 in the first, 4×6 in the second"):
        principal_angles(one, adapter_of({"x": planted(4, 6, [1.0], seed=0)}))


def test_adapters_of_different_bases_are_refused_unless_that_is_accepted():
    pair = []
    for seed in (0, 1):
        model = build("llama", seed=seed)
        attach_random(model, rank=2, targets="q")
        pair.append(lk.extract(model))
    with pytest.raises(AnalysisError, match=r"different bases.*\n.*sampled weights differ"):
        subspace_similarity(*pair)
    phi = subspace_similarity(*pair, allow_other_base=True)
    assert phi["model.layers.0.self_attn.q_proj"][-1, -1].item() == pytest.approx(1)
