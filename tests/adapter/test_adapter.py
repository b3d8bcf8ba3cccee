"""Adapter: its content hash stays the one that files hold which were written before."""

import dataclasses
import hashlib
import json

import pytest
import torch

import lorakit.adapter.content
from adapter.handmade import adapter, site, slice_of


def counted(**tensors):
    """An adapter whose values are 0, 1, 2, …, with more tensors beside A and B."""
    sites = (site("b.é"), slice_of("a", "q", (0, 8)))
    made = adapter(*sites, copied_modules=("head", "body"))
    values = {
        name: torch.arange(float(tensor.numel())).reshape(tensor.shape)
        for name, tensor in made.tensors.items()
    }
    return dataclasses.replace(made, tensors=values | tensors)


def naive_hash(made):
    """The hash with each tensor and each site fed by itself."""
    digest = hashlib.sha256()
    for name, tensor in sorted(made.tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for each in sorted(made.sites, key=lambda each: each.name):
        meaning = [each.name, each.rank, each.alpha, each.scale, each.rows, each.groups]
        digest.update(json.dumps(meaning).encode())
    digest.update(json.dumps(sorted(made.copied_modules)).encode())
    return digest.hexdigest()


def test_the_content_hash_is_that_of_files_written_before():
    expected = "a14e63a5dfde03b0b0ae5e1e4f9ee6342c4aba6c3563566473d2e5979cf860e3"
    assert counted().content_hash() == naive_hash(counted()) == expected


@pytest.mark.parametrize("lump_bytes", [1, 100, lorakit.adapter.content.LUMP_BYTES])
def test_the_content_hash_does_not_depend_on_how_its_bytes_are_read(monkeypatch, lump_bytes):
    monkeypatch.setattr(lorakit.adapter.content, "LUMP_BYTES", lump_bytes)
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    odd = {
        "bfloat16": values.bfloat16(),
        "float16": values.half(),
        "float64": values.double(),
        "small": values.to(torch.float8_e4m3fn),
        "transposed": values.T,
        "every other": values[::2, ::2],
        "number": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "trained": values.clone().requires_grad_(),
    }
    plain = {name: tensor.detach() for name, tensor in odd.items()}
    assert counted(**odd).content_hash() == naive_hash(counted(**plain))
