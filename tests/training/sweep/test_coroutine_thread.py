"""A coroutine thread: it runs only while its owner waits for it."""

from collections.abc import Callable

import torch

from lorakit.training.sweep.coroutine_thread import CoroutineThread


def test_a_coroutine_thread_has_its_own_random_numbers():
    def work(submit):
        torch.manual_seed(5)
        return [torch.rand(1).item() for _ in range(3) if submit("a request") is None]

    thread = CoroutineThread("worker", work)
    torch.manual_seed(1)
    expected_outside = torch.rand(4)[1:].tolist()
    torch.manual_seed(1)
    torch.rand(1)
    outside = []
    while thread.advance() is not None:
        outside.append(torch.rand(1).item())
    torch.manual_seed(5)
    assert thread.result == torch.rand(3).tolist()
    assert outside == expected_outside


def test_a_coroutine_thread_keeps_its_error_and_can_be_closed():
    def fail(submit):
        raise ValueError("no")

    failed = CoroutineThread("fails", fail)
    assert failed.advance() is None
    assert isinstance(failed.error, ValueError)

    def count(submit: Callable[[int], int]) -> None:
        for number in range(10**9):
            submit(number)

    endless = CoroutineThread("endless", count)
    assert endless.advance() == 0
    endless.close()
    assert isinstance(endless.error, SystemExit)
