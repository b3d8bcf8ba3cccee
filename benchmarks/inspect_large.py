"""How long it takes to look into an adapter of the shape of an 8B model's.

    python benchmarks/inspect_large.py [--out FILE]

224 updates (q, k, v, o, gate, up and down in 32 blocks) of rank 16 with random numbers, saved as a
folder, and inspected as `lorakit inspect` does: the folder read with every check, the spectrum of
every ΔW, the text. The base is not needed. What it adds is measured on one block of random weights
in bfloat16: norms beside the weights', and amplification, with one pass over the weights.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lorakit as lk
from lorakit.adapter.site import Site
from lorakit.cli.inspect import run
from lorakit.config.verbs import InspectConfig
from measured import begin, write_result

BLOCKS = 32
RANK = 16
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
"""(d_out, d_in) of the layers of a block of Llama 3 8B."""


def adapter_of(blocks: int) -> lk.Adapter:
    """An adapter with random A and B in every layer of some blocks."""
    generator = torch.Generator().manual_seed(0)
    tensors, sites = {}, []
    for block in range(blocks):
        for part, (d_out, d_in) in SHAPES.items():
            path = f"model.layers.{block}.{part}"
            sites.append(Site(path=path, rank=RANK, alpha=32.0, scale=2.0))
            tensors[f"{path}.lora_a"] = torch.randn(RANK, d_in, generator=generator) * 0.02
            tensors[f"{path}.lora_b"] = torch.randn(d_out, RANK, generator=generator) * 0.02
    config = lk.LoRAConfig(rank=RANK, alpha=32, targets="all-linear")
    return lk.Adapter(configs=(config,), sites=tuple(sites), tensors=tensors)


def block_of_base() -> nn.Module:
    """One block's weights in bfloat16, as a module with the paths of the adapter's sites."""
    model = nn.Module()
    for part, (d_out, d_in) in SHAPES.items():
        owner = model
        for name in f"model.layers.0.{part}".split(".")[:-1]:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        layer = nn.Linear(d_in, d_out, bias=False, device="meta", dtype=torch.bfloat16)
        layer = layer.to_empty(device="cpu")
        nn.init.normal_(layer.weight, std=0.02)
        owner.add_module(part.rpartition(".")[2], layer)
    return model


def seconds_of(work: Any, clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes, by a clock."""
    start = clock()
    work()
    return clock() - start


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    where = begin(out)
    with tempfile.TemporaryDirectory() as folder:
        adapter = adapter_of(BLOCKS)
        adapter.save(Path(folder) / "large")
        settings = InspectConfig(adapter=str(Path(folder) / "large"))
        whole = seconds_of(lambda: run(settings))
    spectra = seconds_of(lambda: lk.analysis.spectrum(adapter))
    one, base = adapter_of(1), block_of_base()
    beside = seconds_of(lambda: lk.analysis.spectrum(one, model=base))
    amplified = seconds_of(lambda: lk.analysis.amplification(one, base))
    worked = seconds_of(lambda: lk.analysis.amplification(one, base), time.process_time)
    figures = {
        "updates": len(adapter.sites),
        "rank": RANK,
        "adapter_bytes": adapter.size_bytes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "inspect_s": whole,
        "spectrum_s": spectra,
        "spectrum_with_base_s_per_block": beside,
        "amplification_s_per_block": amplified,
        "amplification_cpu_s_per_block": worked,
    }
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value:,}")
    result = {"benchmark": "inspect_large", "command": "python benchmarks/inspect_large.py"}
    write_result(out, {**result, **figures, "environment": where})


if __name__ == "__main__":
    main()
