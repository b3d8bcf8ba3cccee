"""A strand: a thread that takes turns with its owner."""

import torch

from lorakit.training.sweep.coroutine_thread import Strand


def test_a_strand_has_its_own_random_numbers():
    def work(ask):
        torch.manual_seed(5)
        return [torch.rand(1).item() for _ in range(3) if ask("a turn") is None]

    strand = Strand("worker", work)
    torch.manual_seed(1)
    expected_outside = torch.rand(4)[1:].tolist()
    torch.manual_seed(1)
    torch.rand(1)
    outside = []
    while strand.advance() is not None:
        outside.append(torch.rand(1).item())
    torch.manual_seed(5)
    assert strand.made == torch.rand(3).tolist()
    assert outside == expected_outside


def test_a_strand_keeps_its_error_and_can_be_closed():
    def fail(ask):
        raise ValueError("no")

    failed = Strand("fails", fail)
    assert failed.advance() is None
    assert isinstance(failed.error, ValueError)
    endless = Strand("endless", lambda ask: [ask(n) for n in range(10**9)])
    assert endless.advance() == 0
    endless.close()
    assert isinstance(endless.error, SystemExit)
