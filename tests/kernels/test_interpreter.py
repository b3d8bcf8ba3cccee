"""The checks of all Triton kernels in Triton's interpreter, which needs no GPU."""

import pytest

from kernels.triton_process import run_checks


@pytest.mark.thorough
def test_the_kernels_keep_their_promises_in_the_interpreter(pytestconfig):
    # In one process, since starting it takes longer than the checks of a file.
    pytest.importorskip("triton", reason="Triton is not installed")
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    run_checks(
        *("liger_checks.py", "segments_checks.py"),
        chosen=pytestconfig.getoption("markexpr"),
        warnings=pytestconfig.getoption("pythonwarnings") or (),
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
