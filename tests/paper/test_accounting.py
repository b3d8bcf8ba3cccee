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
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_flops_allow_the_speed_up_of_the_paper(memory):
    # 43.1 and 32.5 tokens a second: LoRA needs no gradients of weights.
    ratio = step_flops("lora", memory) / step_flops("full", memory)
    assert 0.5 < ratio < 32.5 / 43.1
