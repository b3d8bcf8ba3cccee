"""Bases that were trained on real data, of examples/bases: what adapters add to them, and PEFT."""

import pytest
import torch

import lorakit as lk
from tools.environments import ROOT, run

pytestmark = [
    pytest.mark.thorough,
    # PEFT asks transformers by a name that 5.23 has replaced.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def made(name, folder, package=None):
    """The folder that a program of examples/bases fills."""
    run(package, ROOT / "examples" / "bases" / f"{name}.py", folder, cwd=folder)
    return folder


def same_in_peft(result, inputs):
    """Make sure that PEFT, and the merged model, compute what the attached adapter does."""
    from peft import PeftModel

    model, _ = result.adapter.load_base()
    plain, _ = result.adapter.load_base()
    peft = PeftModel.from_pretrained(plain, result.out).eval()
    lk.attach(model, result.out)
    with torch.no_grad():
        base, ours = _logits(model, inputs, None), _logits(model, inputs, "default")
        theirs = peft(**inputs).logits
        lk.merge(model)
        merged = model(**inputs).logits
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged, ours, atol=1e-3, rtol=1e-3)


def _logits(model, inputs, name):
    with lk.route(model, name):
        return model(**inputs).logits


@pytest.fixture(scope="module")
def nko(tmp_path_factory):
    return made("nko", tmp_path_factory.mktemp("nko"), package="detransliterator")


def test_the_transliterator_writes_what_its_package_says(nko):
    # The example in the package's own description, which fairseq computes.
    (answer,) = lk.generate("musa dunbuya", model=str(nko / "base"), max_new_tokens=30)
    assert answer == "ߡߎߛߊ߫ ߘߎ߲ߓߎߦߊ"


def test_an_adapter_learns_the_tones_that_are_not_written(nko, tmp_path):
    rows = {"validation": str(nko / "validation.jsonl"), "validation_rows": 40}
    held = lk.DataConfig(**rows)
    before = lk.evaluate(model=str(nko / "base"), data=held, metrics=["loss"])
    result = lk.train(
        lk.TrainConfig(
            model=str(nko / "base"),
            out=tmp_path / "out",
            data=lk.DataConfig(train=str(nko / "train.jsonl"), **rows),
            lora=lk.LoRAConfig(rank=16, alpha=32, targets="all-linear"),
            dtype="float32",
            steps=12,
            warmup_steps=2,
            learning_rate=3e-3,
            batch_size=16,
        )
    )
    assert result.scores["loss"] < before["loss"] - 0.02
    again = lk.evaluate(adapter=result.out, data=held, metrics=["loss"])
    assert again["loss"] == pytest.approx(result.scores["loss"], abs=1e-4)
    _, tokenizer = result.adapter.load_base()
    ids = tokenizer("ala ka san nu ni duu dan", return_tensors="pt").input_ids
    same_in_peft(result, {"input_ids": ids, "decoder_input_ids": torch.tensor([[2, 40, 50]])})


def test_a_reader_of_five_digits_learns_the_others(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    made("digits", folder)
    data = lk.DataConfig(train=str(folder / "train"), validation=str(folder / "validation"))
    result = lk.train(
        lk.TrainConfig(
            model=str(folder / "base"),
            task="image-classification",
            fresh_head=True,
            out=tmp_path / "out",
            data=data,
            lora=lk.LoRAConfig(rank=8, alpha=16, targets="all-linear"),
            dtype="float32",
            epochs=3,
            batch_size=16,
            learning_rate=3e-3,
        )
    )
    # Of five classes 0.2 is chance; its own ten epochs come to 0.94.
    assert result.scores["accuracy"] > 0.6
    again = lk.evaluate(adapter=result.out, data=lk.DataConfig(validation=data.validation))
    assert again["accuracy"] == result.scores["accuracy"]
    images = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    same_in_peft(result, {"pixel_values": images})
