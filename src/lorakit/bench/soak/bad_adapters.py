"""Adapters that cannot be served, each made from a good one by one change."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.adapter.peft_config import CONFIG_FILE
from lorakit.adapter.record import RECORD_FILE
from lorakit.adapter.tensor_files import PICKLE_FILE, WEIGHTS_FILE
from lorakit.bench.result import Goal
from lorakit.bench.serving.asking import Client, CompletionRequest, streamed_tokens

Change = Callable[[Path], None]
RAN = "the pickle ran"
"""The folder that code in a bad adapter makes, if it is run."""


def refusing(
    client: Client, asked: CompletionRequest, good: Path, *, streams: int
) -> tuple[list[Goal], list[dict[str, Any]]]:
    """Have a server load bad adapters while others read streams.

    Args:
        client: of the server, which loads from the parent of `good`.
        asked: what the streams ask.
        good: an adapter that can be served, and stays as it is.
        streams: others.

    Returns:
        The goals, and a row of each kind: what was told.
    """
    alone = client.complete(asked).tokens
    names = [card["id"] for card in client.get("/v1/models").body["data"]]
    ended = threading.Event()
    heard: list[bool] = []
    readers = [
        threading.Thread(target=_read, args=(client, asked, alone, heard, ended))
        for _ in range(streams)
    ]
    for reader in readers:
        reader.start()
    try:
        rows = [_told(client, kind, body) for kind, body in _bodies(good, names[0]).items()]
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    after = [card["id"] for card in client.get("/v1/models").body["data"]]
    refused = sum(400 <= row["status"] < 500 and bool(row["told"]) for row in rows)
    count = len(rows)
    return [
        Goal(
            what=f"refused of {count} bad loads",
            got=float(refused),
            limit=float(count),
            unit="",
            at_least=True,
        ),
        Goal.never(f"disturbed of {len(heard):,} streams meanwhile", len(heard) - sum(heard)),
        Goal.never("changes of the list of models", int(names != after)),
        Goal.never("code of an adapter that ran", len(list(good.parent.glob(f"*/{RAN}")))),
    ], rows


def _read(
    client: Client,
    asked: CompletionRequest,
    right: object,
    heard: list[bool],
    ended: threading.Event,
) -> None:
    while not ended.is_set():
        with client.streaming(asked) as response:
            try:
                heard.append(streamed_tokens(response) == right)
            except (OSError, ValueError):
                heard.append(False)


def _told(client: Client, kind: str, body: Mapping[str, Any] | bytes) -> dict[str, Any]:
    answer = client.post("/v1/load_lora_adapter", body)
    told = answer.body["error"]["message"] if isinstance(answer.body, dict) else answer.body
    return {"kind": kind, "status": answer.status, "told": told if not answer.is_good else ""}


def _bodies(good: Path, base: str) -> dict[str, Mapping[str, Any] | bytes]:
    """Bodies of requests to load, by what is wrong with them; makes the folders that they name."""
    root = good.parent
    made: dict[str, Mapping[str, Any] | bytes] = {}
    for kind, change in CHANGES.items():
        folder = shutil.copytree(good, root / f"bad-{kind.replace(' ', '-')}")
        change(folder)
        made[kind] = _body(kind, folder.name)
    return made | {
        "a path outside": _body("outside", str(root.parent)),
        "a path that leaves": _body("leaves", f"../{root.name}/../.."),
        "no such folder": _body("nowhere", "nowhere"),
        "a name that is taken": _body(good.name, good.name),
        "the base's name": _body(base, good.name),
        "an empty name": _body("", good.name),
        "no path": {"lora_name": "pathless"},
        "a path that is a number": {"lora_name": "numbered", "lora_path": 7},
        "an unknown field": _body("ranked", good.name) | {"lora_rank": 8},
        "no JSON": b"{lora_name: bad",
    }


def _body(name: str, path: str) -> dict[str, Any]:
    return {"lora_name": name, "lora_path": path}


def _without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _written(name: str, content: bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def _cut(folder: Path) -> None:
    weights = folder / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])


def _claims_terabytes(folder: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    raw = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw)


def _tensors(edit: Callable[[dict[str, Tensor]], None]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def _of_first(edit: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        first = min(tensors)
        tensors[first] = edit(tensors[first]).contiguous()

    return _tensors(change)


def _config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(found | values))

    return change


class _Ran:
    """What calls a function where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._place),)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": _Ran(folder / RAN)}, folder / PICKLE_FILE)


def _linked(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.symlink("/etc/hostname", folder / WEIGHTS_FILE)


def _spoilt(value: float) -> Callable[[Tensor], Tensor]:
    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = value
        return spoilt

    return spoil


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def _renamed(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.999.mlp.lora_A.weight"] = tensors.pop(min(tensors))


CHANGES: dict[str, Change] = {
    "no weights": _without(WEIGHTS_FILE),
    "no configuration": _without(CONFIG_FILE),
    "an empty weights file": _written(WEIGHTS_FILE, b""),
    "a weights file cut short": _cut,
    "rubbish for weights": _written(WEIGHTS_FILE, b"\xff" * 4096),
    "a header that claims a terabyte": _claims_terabytes,
    "rubbish for a configuration": _written(CONFIG_FILE, b"{"),
    "a list for a configuration": _written(CONFIG_FILE, b"[1, 2]"),
    "rubbish for a record": _written(RECORD_FILE, b"\x00\x01"),
    "a tensor missing": _tensors(_missing),
    "a tensor too many": _tensors(lambda tensors: tensors.update(extra=torch.zeros(2, 2))),
    "a layer that is not there": _tensors(_renamed),
    "a NaN": _of_first(_spoilt(float("nan"))),
    "an infinity": _of_first(_spoilt(float("inf"))),
    "a tensor of another shape": _of_first(lambda tensor: tensor[:, :-1]),
    "a tensor of another rank": _of_first(lambda tensor: tensor[:-1]),
    "a tensor of one dimension": _of_first(lambda tensor: tensor.flatten()),
    "a tensor of integers": _of_first(lambda tensor: tensor.to(torch.int64)),
    "values that are others": _of_first(lambda tensor: tensor + 1),
    "a negative rank": _config(r=-1),
    "rank zero": _config(r=0),
    "a rank that is text": _config(r="eight"),
    "an unknown method": _config(peft_type="MAGIC"),
    "code in a pickle": _pickled,
    "a link that leaves": _linked,
}
