"""The paper's accounting of GPT-3, out of the estimator: memory, checkpoint, speed."""

import pytest

from lorakit.paper.accounting import VALUE_BYTES, held_bytes, step_flops
from lorakit.paper.cell import cells
from lorakit.paper.shapes import GPT3, all_parameters


@pytest.mark.thorough
def test_the_memory_of_gpt3_falls_from_1_2_tb_to_350_gb():
    parameters, trained = all_parameters(GPT3), cells()["table6.qv-4"].published[0].counted
    full = held_bytes(parameters=parameters, trained=parameters, beside=False)
    lora = held_bytes(parameters=parameters, trained=trained, beside=True)
    # The paper's 1.2 TB lies between gradients that are used up at once, and all of them together.
    assert full.without_gradients < 1.2e12 < full.together
    assert round(full.without_gradients / 1e12, 2) == 1.05
    assert lora.together == pytest.approx(350e9, rel=0.01)
    assert lora.together / full.without_gradients < 0.334
    # 35 MB are 35 · 2²⁰ bytes and a little.
    assert VALUE_BYTES * trained / 2**20 == pytest.approx(36, abs=0.1)


@pytest.mark.thorough
def test_a_quarter_of_the_time_is_that_of_the_weights_gradients():
    # Forward, and again in the backward pass, gradients of inputs; full: of weights too.
    assert step_flops("lora", "low") / step_flops("full", "low") == pytest.approx(0.75, abs=0.01)
    assert step_flops("lora", "fast") / step_flops("full", "fast") == pytest.approx(
        2 / 3, abs=0.015
    )
