"""Thousands of damaged adapter folders: each is refused in words, or gives the original adapter."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from adapter.handmade import head_and_biases, patterns, slices, slices_of_scales_1_and_3
from lorakit.adapter.adapter import Adapter
from lorakit.adapter.record import checksum
from lorakit.errors import LorakitError

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], None]
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lorakit.json"
VALUES: tuple[Any, ...] = (0, 1, -3, 2.5, 1e400, "", "q_proj", ".*", True, False, None, [], {}, [1])
ROUNDS = 210
PARTS = [0, *(pytest.param(part, marks=pytest.mark.thorough) for part in (1, 2))]


def flip(rng: random.Random, files: Files) -> None:
    name = rng.choice(sorted(files))
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 1, 4))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def insert(rng: random.Random, files: Files) -> None:
    name = rng.choice(sorted(files))
    at = rng.randrange(len(files[name]) + 1)
    files[name] = files[name][:at] + rng.randbytes(rng.randint(1, 9)) + files[name][at:]


def delete(rng: random.Random, files: Files) -> None:
    name = rng.choice(sorted(files))
    at = rng.randrange(len(files[name]))
    files[name] = files[name][:at] + files[name][at + rng.choice((1, 8, 10_000)) :]


def swap_digits(rng: random.Random, files: Files) -> None:
    name = rng.choice((CONFIG, RECORD))
    text = files[name].decode()
    digits = [index for index, letter in enumerate(text) if letter.isdigit()]
    at = rng.choice(digits or [0])
    files[name] = (text[:at] + str(rng.randrange(10)) + text[at + 1 :]).encode()


def _containers(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict | list) and value else []
    return own + [found for each in inner for found in _containers(each)]


def edit_json(rng: random.Random, files: Files) -> None:
    name = rng.choice((CONFIG, RECORD))
    content = json.loads(files[name])
    holder = rng.choice(_containers(content))
    key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    action = rng.randrange(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "use_dora", "alpha", "layers_to_transform"))] = holder.pop(key)
    elif action == 2 and isinstance(holder[key], int | float):
        holder[key] = holder[key] * 2 + 1
    else:
        holder[key] = rng.choice(VALUES)
    if name == RECORD and rng.random() < 0.5:  # as someone who edits on purpose would
        content["checksum"] = checksum(content)
    files[name] = json.dumps(content).encode()


def edit_tensors(rng: random.Random, files: Files) -> None:
    tensors = safetensors.torch.load(files[WEIGHTS])
    key = rng.choice(sorted(tensors))
    changed: dict[str, Callable[[], Tensor]] = {
        "reshape": lambda: tensors[key].reshape(-1),
        "transpose": lambda: tensors[key].T if tensors[key].dim() == 2 else tensors[key][None],
        "dtype": lambda: tensors[key].to(rng.choice((torch.float16, torch.float64, torch.int8))),
        "shorten": lambda: tensors[key][:-1],
        "nudge": lambda: tensors[key] + 1e-3,
        "poison": lambda: tensors[key] * float("nan"),
        "negate": lambda: -tensors[key],
        "empty": lambda: tensors[key][:0],
    }
    action = rng.choice([*changed, "drop", "rename", "add", "exchange"])
    if action in changed:
        tensors[key] = changed[action]().contiguous()
    elif action == "drop":
        del tensors[key]
    elif action == "rename":
        tensors[rng.choice((f"base_model.model.{key}", f"{key}.default", "x"))] = tensors.pop(key)
    elif action == "add":
        tensors[f"base_model.model.extra{rng.randrange(9)}.lora_A.weight"] = torch.ones(2, 2)
    else:
        other = rng.choice(sorted(tensors))
        tensors[key], tensors[other] = tensors[other].clone(), tensors[key].clone()
    files[WEIGHTS] = safetensors.torch.save(tensors, metadata={"format": "pt"})


def exchange_a_file(rng: random.Random, files: Files) -> None:
    name = rng.choice((CONFIG, WEIGHTS, RECORD))
    files[name] = rng.choice((b"", b"{}", b"null", files[CONFIG], files[WEIGHTS], files[RECORD]))


MUTATIONS = (flip, insert, delete, swap_digits, edit_json, edit_tensors, exchange_a_file)
MAKERS = (slices, patterns, head_and_biases, slices_of_scales_1_and_3)


def _scales(adapter: Adapter) -> dict[str, float]:
    return {site.name: site.scale for site in adapter.sites}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_damage_is_refused_or_changes_nothing(
    make: Callable[[], Adapter], part: int, tmp_path: Path
) -> None:
    original = make()
    folder = original.save(tmp_path / "a")
    intact = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, RECORD)}
    rng = random.Random(f"{make.__name__} {part}")
    refused = 0
    for mutate in MUTATIONS * (ROUNDS // len(MUTATIONS)):
        files = dict(intact)
        mutate(rng, files)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        try:
            loaded = Adapter.load(folder)
        except LorakitError:
            refused += 1
        else:
            assert loaded.content_hash() == original.content_hash(), mutate.__name__
            assert _scales(loaded) == _scales(original), mutate.__name__
    assert refused > ROUNDS // 3
