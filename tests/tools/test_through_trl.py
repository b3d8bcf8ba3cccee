"""Preferences with TRL computing the loss: runs end where lorakit's own loss has them end."""

import json
import shutil
from pathlib import Path

import pytest

from mixtures import mixture
from tools.environments import run

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def found(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("through")
    mixture("mixtral").save_pretrained(folder / "experts")
    for file in tiny_llama.glob("tokenizer*"):
        shutil.copy(file, folder / "experts")
    program = Path(__file__).parent / "through_trl.py"
    told = run("trl", program, tiny_llama, folder / "experts", folder, cwd=folder)
    # The JSON is on stdout, which comes first; TRL says nothing before it.
    (line,) = [each for each in told.splitlines() if each.startswith("{")]
    return json.loads(line)


def test_runs_are_those_of_lorakit_s_own_loss(found):
    assert sorted(found["forms"]) == ["cpo", "dpo", "ipo", "orpo", "simpo"]
    more = ("memory", "half", "experts")
    for form, each in [*found["forms"].items(), *((name, found[name]) for name in more)]:
        ours, theirs = each["loss"]
        assert ours == pytest.approx(theirs, rel=1e-6), form
        assert len({round(loss, 3) for loss in ours}) == len(ours) == 5, form
        assert each["scores"][0] == pytest.approx(each["scores"][1], rel=1e-5), form
        assert each["apart"] < 1e-5, form
        assert {"rewards/margins", "logps/chosen"} <= set(each["figures"]), form
        assert "epoch" not in each["figures"]


def test_a_run_that_goes_on_ends_in_the_same_bytes(found):
    assert found["resumed"] is True


def test_other_losses_of_trl_are_trained(found):
    # Of a fresh adapter 1 − σ(0) + σ(0), and then less.
    assert found["apo"][0] == pytest.approx(1.0)
    assert found["apo"][-1] < 0.99


def test_what_trl_would_leave_out_or_does_not_know_is_told(found):
    for message in found["heads"].values():
        assert "takes the weight of the output head" in message
    assert "Unknown loss type: apo." in found["loss_type"]
    assert found["kept"], "the run that was there before is gone"
    assert "first row is nan with TRL before any training" in found["infinite"]
    assert found["still"], "the run that was there before is gone"
    assert "Unknown f_divergence_type: chi" in found["divergence"]
    assert "did you mean 'loss_type'?" in found["name"]
    assert "beta is no setting of its loss for dpo" in found["name"]
