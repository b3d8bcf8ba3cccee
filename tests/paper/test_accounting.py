"""The paper's accounting of GPT-3, out of the estimator: memory, checkpoint, speed."""

import pytest

from lorakit.paper.accounting import VALUE_BYTES, accounting, gpt3_estimate
from lorakit.paper.cell import cells
from lorakit.paper.shapes import GPT3, all_parameters

pytestmark = pytest.mark.thorough


def test_the_estimate_holds_what_the_formula_says():
    parameters, trained = all_parameters(GPT3), cells()["table6.qv-4"].published[0].counted
    full, lora = accounting("full"), accounting("lora")
    assert (full.trained, lora.trained) == (parameters, trained)
    assert full.weights == full.gradients == VALUE_BYTES * parameters
    assert full.gradients == gpt3_estimate("full").training["gradients"]
    assert lora.weights == VALUE_BYTES * (parameters + trained)
    assert lora.gradients == VALUE_BYTES * trained
    # Two values of each trained one, and a step number of each tensor.
    for found in (full, lora):
        assert found.moments == pytest.approx(2 * VALUE_BYTES * found.trained, rel=1e-4)


def test_the_memory_of_gpt3_falls_from_1_2_tb_to_350_gb():
    full, lora = accounting("full"), accounting("lora")
    # The paper's 1.2 TB lies between gradients that are used up at once, and all of them together.
    assert full.without_gradients < 1.2e12 < full.together
    assert round(full.without_gradients / 1e12, 2) == 1.05
    assert lora.together == pytest.approx(350e9, rel=0.01)
    assert lora.together / full.without_gradients < 0.334
    # 35 MB are 35 · 2²⁰ bytes and a little.
    assert lora.checkpoint / 2**20 == pytest.approx(36, abs=0.2)


def test_flops_allow_the_speed_up_of_the_paper():
    # 43.1 and 32.5 tokens a second: LoRA needs no gradients of weights.
    assert 0.5 < accounting("lora").flops / accounting("full").flops < 32.5 / 43.1
