import pytest
import torch

from lorakit.kernels.dropout import Dropout

CPU = torch.device("cpu")


def test_a_seed_gives_the_same_mask_again_and_another_seed_another():
    first, again, other = (Dropout(0.5, seed).mask(9, 7, CPU) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_as_many_elements_are_dropped_as_asked_for(probability):
    size = 1000
    dropped = 1 - Dropout(probability, 0).mask(size, size, CPU).double().mean().item()
    assert abs(dropped - probability) < 4 * (probability * (1 - probability)) ** 0.5 / size


def test_neighbours_are_dropped_independently():
    mask = Dropout(0.5, 0).mask(1000, 1000, CPU).double() - 0.5
    for distance in (1, 2, 3, 4, 1000):
        flat = mask.flatten()
        assert abs((flat[distance:] * flat[:-distance]).mean()) < 1e-3


@pytest.mark.parametrize("probability", [1e-9, 0.1, 0.999999])
def test_means_stay_as_they_are(probability):
    drop = Dropout(probability, 1)
    kept = drop.mask(1, 2**16, CPU).double().mean().item()
    # The factor belongs to the probability in steps of 1/65536, and one step is always kept.
    expected = max(1, round((1 - probability) * 2**16)) / 2**16
    assert drop.factor == 1 / expected
    assert abs(kept - expected) < 0.01
    assert torch.equal(drop.of(torch.ones(1, 9)), drop.mask(1, 9, CPU) * drop.factor)


def test_seeds_come_from_the_global_generator():
    torch.manual_seed(0)
    first = [Dropout.drawn(0.1) for _ in range(3)]
    torch.manual_seed(0)
    assert [Dropout.drawn(0.1) for _ in range(3)] == first
    assert len(set(first)) == 3


def test_nothing_is_drawn_where_nothing_drops():
    before = torch.get_rng_state()
    assert Dropout.drawn(0.0) is None
    assert torch.equal(torch.get_rng_state(), before)
