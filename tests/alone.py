"""What an environment with the wheel and no extra does: `make test-wheel` runs this there."""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

import lorakit as lk


def main() -> None:
    """Adapt, train, save, load and merge a tiny model; ask for what is not installed."""
    there = [
        name for name in ("peft", "fastapi", "gguf", "matplotlib", "pytest") if find_spec(name)
    ]
    assert not there, f"{', '.join(there)} should not be here"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    lk.attach(model, lk.LoRAConfig(rank=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        trained = model(input_ids=ids).logits
        lk.extract(model).save(Path(folder) / "mine")
        lk.detach(model)
        lk.attach(model, Path(folder) / "mine")
        torch.testing.assert_close(model(input_ids=ids).logits, trained, rtol=0, atol=0)
        lk.merge(model)
        torch.testing.assert_close(model(input_ids=ids).logits, trained)
    line = [sys.executable, "-m", "lorakit", "serve", "--model", "smollm2"]
    told = subprocess.run(line, capture_output=True, text=True, check=False)
    assert told.returncode == 2, told
    assert "pip install 'lorakit[" in told.stderr, told.stderr
    print(f"lorakit {lk.__version__} works alone; what needs more says so: {told.stderr.strip()}")


if __name__ == "__main__":
    main()
