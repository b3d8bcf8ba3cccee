from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lorakit.kernels.choice import fast, use


def test_fast_paths_are_on_by_default():
    assert fast()


def test_blocks_nest_and_the_innermost_decides():
    with use("plain"):
        assert not fast()
        with use("auto"):
            assert fast()
        assert not fast()
    assert fast()


def test_an_error_ends_the_block():
    with pytest.raises(ZeroDivisionError), use("plain"):
        _ = 1 / 0
    assert fast()


def test_other_threads_and_autograds_see_the_choice():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(fast()))
    with use("plain"), ThreadPoolExecutor() as threads:
        seen.append(threads.submit(fast).result())
        x.sum().backward()
    assert seen == [False, False]


def test_blocks_that_close_in_another_order_leave_the_open_one_in_force():
    first, second = use("plain"), use("plain")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not fast()
    second.__exit__(None, None, None)
    assert fast()
