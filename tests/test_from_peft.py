"""README's translation from PEFT: each pair of lines does the same to the same model."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorakit as lk
from references import attach_random

# PEFT asks transformers in words that it is giving up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
peft = pytest.importorskip("peft")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
LOADS_SAVED, LOADS_SECOND = 3, 4
"""The lines of the table that load an adapter, the first in place of what was there."""
PAIRS = re.findall(r"^\| (`.+`) \| (`.+`) \|$", README, flags=re.MULTILINE)


class Side:
    """The lines of one column, run in a folder and with a model of their own."""

    def __init__(self, column, folder, base, batch, monkeypatch):
        self._lines = [pair[column] for pair in PAIRS]
        self._folder, self._base, self._monkeypatch = folder, base, monkeypatch
        self.names = {**vars(peft), "lk": lk, "batch": batch}
        self.load_base()

    def load_base(self):
        self.names["model"] = AutoModelForCausalLM.from_pretrained(self._base)

    def run(self, number):
        """Run the lines of a row of the table; returns the logits that the model then has."""
        self._monkeypatch.chdir(self._folder)
        with torch.no_grad():
            for line in re.findall("`(.+?)`", self._lines[number]):
                exec(line.replace("model(**batch", "answer = model(**batch"), self.names)
            answered = self.names.pop("answer", None)
            answered = answered or self.names["model"](**self.names["batch"])
        return answered.logits


def test_each_line_of_the_translation_does_what_pefts_does(tiny_llama, tmp_path, monkeypatch):
    batch = {"input_ids": torch.arange(8, 20).reshape(2, 6)}
    sides = []
    for column, name in enumerate(["peft", "lorakit"]):
        folder = tmp_path / name
        folder.mkdir()
        sides.append(Side(column, folder, tiny_llama, batch, monkeypatch))
    theirs, ours = sides
    assert len(PAIRS) == 10
    expected, got = [], []
    for number in range(len(PAIRS)):
        if number == LOADS_SAVED:
            _give_both_random_adapters(tmp_path, tiny_llama)
            theirs.load_base()
            ours.load_base()
        expected.append(theirs.run(number))
        got.append(ours.run(number))
    # What is attached is active at once; what PEFT loads, once it is set.
    expected[LOADS_SECOND] = expected[LOADS_SECOND + 1]
    for line, (one, other) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=f"line {line}")
    first, second, base, mixed = (got[line] for line in (LOADS_SAVED, 5, 6, 7))
    assert not torch.allclose(base, first, atol=1e-2)
    assert not torch.allclose(first, second, atol=1e-2)
    torch.testing.assert_close(mixed[0], first[0])


def _give_both_random_adapters(folder, base):
    """Put the same two adapters where both sides look for them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for side in ("peft", "lorakit"):
        shutil.rmtree(folder / side / "out")
        for seed, name in enumerate("ab"):
            attach_random(model, seed=seed, targets=["q_proj", "v_proj"], rank=8, alpha=16)
            lk.extract(model).save(folder / side / "out" / name)
            lk.detach(model)
