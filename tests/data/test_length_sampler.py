"""Rows of like length share a batch, and every row comes once."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.data.length_sampler import ByLength

LENGTHS = [1 + (7 * row) % 40 for row in range(230)]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
@settings(max_examples=40)
def test_every_row_comes_once(lengths, batch_size, epoch):
    order = ByLength(lengths, batch_size=batch_size, seed=3)
    order.set_epoch(epoch)
    assert sorted(order) == list(range(len(lengths))) == sorted(order)
    assert len(order) == len(lengths)


def test_the_order_follows_from_seed_and_epoch():
    first, again, other = (ByLength(LENGTHS, batch_size=8, seed=s) for s in (0, 0, 1))
    orders = [list(first), list(again), list(other)]
    first.set_epoch(1)
    orders.append(list(first))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]


def test_batches_are_of_like_length_and_not_in_order_of_length():
    rows = list(ByLength(LENGTHS, batch_size=8, seed=0))
    batches = [[LENGTHS[row] for row in rows[start : start + 8]] for start in range(0, 230, 8)]
    assert sum(8 * max(b) - sum(b) for b in batches[:-1]) < 0.05 * sum(LENGTHS)
    longest = [max(batch) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
