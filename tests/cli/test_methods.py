"""Every method from the command line: trained, scored, asked, merged or refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorakit.attachment.open_model import open_model
from lorakit.config.methods import METHODS

MERGE = ("lora", "full", "top-k")


# In `make test`: those that can be merged, but for one, and one of each other kind.
SHOWN = ("prefix-layer",)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in SHOWN else pytest.mark.thorough) for m in METHODS]
)
def test_a_method_learns_and_its_folder_goes_through_every_verb(
    method, tiny_llama, prompt_rows, tmp_path, run
):
    out, rows = tmp_path / "adapter", ["--data.validation", prompt_rows, "--metrics", "loss"]
    added = ["--bitfit.add-missing"] if method == "bitfit" else []
    words = ["--model", tiny_llama, "--dtype", "float32", "--data.train", prompt_rows, *added]
    code, result = run("train", *words, "--method", method, "--out", out, "--steps", 30)
    assert code == 0
    assert result["last_loss"] < result["first_loss"]
    _, base = run("evaluate", "--model", tiny_llama, *rows)
    code, scores = run("evaluate", "--adapter", out, *rows)
    assert code == 0
    assert scores["loss"] < base["loss"]
    code, answers = run(
        "generate", "--adapter", out, "--prompt", "red cat dog", "--max-new-tokens", 3
    )
    assert code == 0
    assert len(answers["answers"]) == 1
    code, result = run("merge", "--adapter", out, "--out", tmp_path / "merged")
    assert (code == 0) == (method in MERGE)
    if method not in MERGE:
        assert "cannot be merged, so it keeps its extra latency" in result["error"]["message"]
        assert not (tmp_path / "merged").exists()
        return
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        expected = open_model(out).model(ids).logits
        torch.testing.assert_close(plain(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("full,lora", "full trains every weight already, so it goes with no other method"),
        ("lora,lora", "lora is named twice"),
        (
            "prefix-layer,prefix-embedding",
            "prefix-layer and prefix-embedding both put virtual tokens into the model: choose one",
        ),
        (
            "adapter-h,adapter-l",
            "adapter-h and adapter-l both put bottlenecks into the model: choose one",
        ),
        ("", "no method is given"),
        ("lorra", "unknown lorra; known: lora, full, top-k,"),
        ("lora,top-k", "leave these blocks out of the other method (lora.layers, lora.exclude"),
        ("lora,bitfit --lora.dtype bfloat16", "lora in bfloat16, bitfit in float32"),
        ("bitfit --lora-plus-ratio 16", "lora_plus_ratio is LoRA's, and the method is bitfit"),
        ("prefix-embedding --prefix.prefix 40", "leaves no room for a row in the model's context"),
        ("adapter-h --bottleneck.size 999", "999"),
    ],
)
def test_what_cannot_be_trained_together_is_told(methods, message, tiny_llama, prompt_rows, run):
    name, *words = methods.split(" ")
    given = ["--model", tiny_llama, "--data.train", prompt_rows, "--dry-run", "--out", "none"]
    added = ["--bitfit.add-missing"]
    code, result = run("train", *given, *added, "--method", name, *words)
    assert code == 2
    assert message in result["error"]["message"]
